"""The command line: one document on stdout, exit codes, tables."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .schema import check_document, check_methods
from .tiny import save_tiny_model


def torchaccel(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from torchaccel.cli.app import app; app()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_json_on_stdout_is_one_document_and_nothing_else(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    done = torchaccel(
        *("bench", "decode", "--model", str(folder), "--context", "64", "--baselines", "eager", "--steps", "2"),
        *("--warmup", "0", "--warm", "--device", "cpu", "--json", "-"),
    )
    found = json.loads(done.stdout)
    check_document(found)
    assert [r["variant"] for r in found["results"]] == ["eager", "torchaccel:exact", "torchaccel:int8"]
    assert done.returncode == 0, done.stderr
    assert "compiling and warming up" in done.stderr


def test_ctrl_c_leaves_a_valid_document(tmp_path: Path) -> None:
    folder, path = save_tiny_model(tmp_path / "model"), tmp_path / "found.json"
    arguments = ["bench", "decode", "--model", str(folder), "--context", "8", "--steps", "100000", "--warmup", "0"]
    arguments += ["--baselines", "kvpress:snapkv,eager", "--options", '{"preset": "exact"}', "--device", "cpu"]
    # Whoever runs the tests in the background lets their children ignore Ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from torchaccel.cli.app import app; app()"
    command = [sys.executable, "-c", code, *arguments, "--json", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            deadline = time.monotonic() + 240
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            # An interrupt that meets a library's callback is lost; whoever presses the keys then presses them again.
            while running.poll() is None and time.monotonic() < deadline + 60:
                running.send_signal(signal.SIGINT)
                # Not too soon: one that meets the interpreter's end kills it.
                with suppress(subprocess.TimeoutExpired):
                    running.wait(timeout=20)
            _, told = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130, told
    assert "interrupted" in told
    check_document(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "decode", "--baselines", "jit"), "unknown baseline 'jit'"),
        (("bench", "decode", "--options", "{int8}"), "is not JSON"),
        (("bench", "attention", "--phase", "decoding"), "unknown phase 'decoding'"),
        (("bench", "decode", "--options", '{"kv_compresion": "int8"}'), "kv_compresion"),
        (("bench", "decode", "--model", "no-such-model"), "none of demo, llama-110m and minilm"),
        (("bench", "prefill", "--context", "-3"), "--context"),
        (("methods", "--family", "attention"), "unknown family 'attention'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_unusable_arguments_exit_with_2_and_say_why(arguments: tuple[str, ...], message: str) -> None:
    done = torchaccel(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_methods_as_json() -> None:
    everything = json.loads(torchaccel("methods", "--json").stdout)
    check_methods(everything)
    family = json.loads(torchaccel("methods", "--family", "kv_compression", "--json").stdout)
    assert family == [row for row in everything if row["family"] == "kv_compression"]


def test_info_names_versions_and_devices() -> None:
    found = json.loads(torchaccel("info", "--json").stdout)
    assert {"torchaccel", "torch", "compiler", "cpu", "cores", "cuda"} <= set(found)
