"""The command, and plans that travel in bundles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import torchaccel
from tests.e2e.generation import greedy, prompt
from tests.models.families import build
from torchaccel.calibration.plan import read_plan
from torchaccel.cli.app import app
from torchaccel.tuning.bundle import Bundle, read_bundle
from torchaccel.tuning.fingerprint import fingerprint


def test_a_bundle_brings_the_plan(tmp_path: Path) -> None:
    plan = torchaccel.calibrate(build("llama", layers=1), "cskv", [prompt(2, 40)])
    plan.save(tmp_path / "plan.safetensors")
    made = Bundle(fingerprint(torch.device("cpu")), {}, (), {"cskv": plan.to_bytes()}, {}, None)
    made.write(tmp_path / "model.bundle")
    assert read_bundle(tmp_path / "model.bundle").calibration == {"cskv": plan.to_bytes()}
    inputs = prompt(1, 70)

    def answers(method: object, **more: object) -> torch.Tensor:
        return greedy(
            torchaccel.compile(build("llama", layers=1), gate=False, kv_compression=method, **more), inputs, 16
        )

    path = str(tmp_path / "plan.safetensors")
    expected = answers({"method": "cskv", "plan": path})
    Path(path).unlink()
    bundle = str(tmp_path / "model.bundle")
    for method in ("cskv", {"method": "cskv", "plan": path}):
        torch._dynamo.reset()
        assert torch.equal(answers(method, bundle=bundle), expected)


def test_a_bundle_without_the_plan(tmp_path: Path) -> None:
    Bundle(fingerprint(torch.device("cpu")), {}, (), {}, {}, None).write(tmp_path / "empty")
    model = torchaccel.compile(build("llama", layers=1), kv_compression="cskv", bundle=str(tmp_path / "empty"))
    with pytest.raises(Exception, match="CalibrationError: method 'cskv' needs a calibration plan and was given none"):
        greedy(model, prompt(1, 9), 2)


def test_the_command_makes_a_plan_of_the_embedded_model(tmp_path: Path) -> None:
    out = tmp_path / "plan.safetensors"
    arguments = ["calibrate", "--method", "cskv", "-o", str(out), "--tokens", "512", "--window", "256"]
    found = CliRunner().invoke(app, [*arguments, "--options", '{"key_density": 0.25}'])
    assert found.exit_code == 0, found.output
    plan = read_plan(out)
    assert plan.options["key_density"] == 0.25 and f"sha256 {plan.digest[:16]}" in found.output
    assert f"{len(plan.tensors)} tensors" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--method", "int8"], "asked to calibrate 'int8'"), (["--method", "cskv", "--model", "llama-110m"], "tokenizer")],
)
def test_what_the_command_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["calibrate", *arguments, "-o", str(tmp_path / "plan")])
    assert found.exit_code == 2 and message in " ".join(found.output.split())
    assert not (tmp_path / "plan").exists()
