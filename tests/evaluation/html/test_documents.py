"""Reading files: what is no results document is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torchaccel.cli.app import app
from torchaccel.evaluation.html.documents import parse, read_documents

from . import samples

BROKEN = {
    "not-json": b"{",
    "not-text": b"\xff\xfe\x00",
    "a-list": b"[1]",
    "no-results": b'{"case": {}}',
    "results-no-list": b'{"results": {}}',
    "no-variant": b'{"results": [{"status": "ok"}]}',
    "too-deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_exits_with_2(tmp_path: Path, content: bytes) -> None:
    good, bad, html = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "page.html"
    good.write_text(json.dumps(samples.null_document()))
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is no results document"):
        read_documents([good, bad])
    done = CliRunner().invoke(app, ["report", str(good), str(bad), "--html", str(html)])
    assert done.exit_code == 2
    assert "bad.json" in "".join(done.stderr.split())
    assert not html.exists()


def test_a_missing_file_is_named_and_exits_with_2(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "no.json"), "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 2
    assert "no.jsoncannotbereadNosuchfile" in "".join(done.stderr.split()).replace(":", "")


def test_the_command_writes_one_page_about_all_documents(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.json" for index in range(2)]
    for file in files:
        file.write_text(json.dumps(samples.null_document()))
    html = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", *map(str, files), "--html", str(html)])
    assert done.exit_code == 0, done.output
    assert "2. séance" in html.read_text(encoding="utf-8")


def test_a_speed_up_needs_no_baseline_of_its_own_name() -> None:
    (document,) = parse([samples.decode_document()])
    assert document.baselines == ["eager", "inductor", "static", "kvpress:snapkv"]
    eager, exact = document.rows[0], document.rows[4]
    assert document.speedup(eager, "eager") == 1.0
    assert document.speedup(exact, "eager") == pytest.approx(92.4 / 23.3)
    assert document.speedup(exact, "flex") is None
