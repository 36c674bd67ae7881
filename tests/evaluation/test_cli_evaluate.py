"""``torchaccel evaluate`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .schema import check_document
from .test_cli import torchaccel
from .tiny import save_tiny_model


def test_one_document_on_stdout_and_a_page(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day, and the clocks struck. " * 40)
    done = torchaccel(
        *("evaluate", "--model", str(folder), "--text", str(text), "--options", '{"preset": "exact"}'),
        *("--tasks", "perplexity", "--window", "48", "--prompt", "32", "--windows", "2", "--batch", "2"),
        *("--device", "cpu", "--json", "-", "--html", str(tmp_path / "page.html")),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    check_document(found)
    assert found["case"]["kind"] == "evaluate" and found["case"]["text"] == str(text)
    assert [r["variant"] for r in found["results"]] == ["eager", "torchaccel:exact"]
    assert found["results"][1]["fidelity"]["max_abs_err_vs_fp32"] < 1e-4
    assert "reading the text, 1 of 1" in done.stderr
    assert "<svg" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "recal"), "unknown task 'recal'"),
        (("--lengths", "long"), "--lengths 'long' must be whole numbers"),
        (("--options", '{"kv_compression": "int9"}'), "did you mean 'int8'"),
        (("--text", "no-such-file"), "no-such-file"),
        (("--html", "no-such-folder/page.html"), "there is no folder no-such-folder"),
        (("--window", "100000"), "a window 100000"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unusable_arguments_exit_with_2_and_say_why(arguments: tuple[str, ...], message: str) -> None:
    done = torchaccel("evaluate", "--device", "cpu", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
