"""Plans: what a file holds, whose model it is, and what is said when it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchaccel.passes.calibrated import PIN, plan_name

import torchaccel
from tests.e2e.generation import greedy, prompt
from tests.models.families import build
from torchaccel.calibration.identity import ModelIdentity, SiteShape, fingerprints
from torchaccel.calibration.plan import CalibrationPlan, plan_from_bytes, read_plan
from torchaccel.errors import CalibrationError, OptionsError
from torchaccel.options import resolve


@pytest.fixture(scope="module")
def plan() -> CalibrationPlan:
    return torchaccel.calibrate(build("llama", layers=1), "cskv", [prompt(2, 40)])


@pytest.fixture
def path(tmp_path: Path, plan: CalibrationPlan) -> Path:
    plan.save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def asked(plan: object, **more: object) -> dict[str, object]:
    return {"kv_compression": {"method": "cskv", "plan": plan, **more}}


def test_a_plan_comes_back_as_it_was(path: Path, plan: CalibrationPlan) -> None:
    found = read_plan(path)
    assert found == plan and hash(found) == hash(plan) and found.source == str(path)
    assert found.model == plan.model and found.options == plan.options and found.version == torchaccel.__version__
    assert found.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(found.tensors[name], x) for name, x in plan.tensors.items())
    assert not list(path.parent.glob("*.partial"))
    assert found != replace(plan, tensors={**plan.tensors, "x": torch.ones(1)})
    assert found != replace(plan, options={})


def test_equal_inputs_make_equal_plans(plan: CalibrationPlan) -> None:
    assert torchaccel.calibrate(build("llama", layers=1), "cskv", [prompt(2, 40)]) == plan


def test_a_changed_tensor_is_noticed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with pytest.raises(CalibrationError, match="is damaged: its SHA-256 is"):
        plan_from_bytes(bytes(content), "here")


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x02\0\0\0\0\0\0\0{}", b"\x80\x04pickle."])
def test_what_is_no_plan_is_refused(content: bytes) -> None:
    with pytest.raises(CalibrationError, match=r"here is no calibration plan.*torchaccel calibrate"):
        plan_from_bytes(content, "here")


def test_another_format_is_refused(plan: CalibrationPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    content = plan.to_bytes()
    monkeypatch.setattr("torchaccel.calibration.plan.FORMAT", 2)
    with pytest.raises(CalibrationError, match="has format 1, this version of torchaccel reads format 2"):
        plan_from_bytes(content, "here")


def test_a_method_without_its_plan_says_how_to_make_one() -> None:
    for given in ("cskv", {"method": "cskv"}):
        with pytest.raises(CalibrationError, match=r"torchaccel calibrate --method cskv --model MODEL --text"):
            torchaccel.compile(build("llama", layers=1), kv_compression=given)
    with pytest.raises(CalibrationError, match=r"'nowhere.safetensors' cannot be read \(No such file"):
        resolve(asked("nowhere.safetensors"))


def test_options_that_a_plan_decides(path: Path) -> None:
    (method,) = resolve(asked(str(path))).methods
    assert method.options.key_density == 0.5 and method.options.plan == read_plan(path)  # type: ignore[attr-defined]
    resolve(asked(str(path), key_density=0.5))
    with pytest.raises(OptionsError, match=r"was made with key_density=0\.5; found key_density=0\.25"):
        resolve(asked(str(path), key_density=0.25))


def test_reports_name_the_plan_and_its_content(path: Path, plan: CalibrationPlan) -> None:
    named = resolve(asked(str(path))).requested()["kv_compression"]["plan"]
    assert named == plan_name(read_plan(path)) == f"{path}{PIN}{plan.digest[:16]}"
    assert resolve(asked(named)).methods[0].options.plan == plan  # type: ignore[attr-defined]
    replace(plan, options={}).save(path)
    with pytest.raises(CalibrationError, match="it was changed since"):
        resolve(asked(named))


def test_a_plan_of_another_method_is_refused(plan: CalibrationPlan) -> None:
    with pytest.raises(CalibrationError, match="a plan is for the method it was made for"):
        resolve(asked(replace(plan, method="other")))


def test_a_plan_of_other_weights_is_refused(plan: CalibrationPlan) -> None:
    with pytest.raises(CalibrationError, match="with other weights"):
        torchaccel.compile(build("llama", layers=1, seed=1), **asked(plan))
    torchaccel.compile(build("llama", layers=1, dtype=torch.bfloat16), **asked(plan))


def test_the_graph_is_checked_too(plan: CalibrationPlan) -> None:
    model = build("llama", layers=1, seed=1)
    compiled = torch.compile(model.forward, backend="torchaccel", options=asked(plan))
    with torch.no_grad(), pytest.raises(Exception, match="with other weights"):
        compiled(**prompt(1, 8))


def test_another_shape_is_told_before_other_weights() -> None:
    identity = ModelIdentity("Model", (SiteShape(4, 2, 16),), ())
    identity.check_sites([SiteShape(4, 2, 16)], "the plan")
    with pytest.raises(CalibrationError, match="with 1 attention layers; this model has 2"):
        identity.check_sites([SiteShape(4, 2, 16)] * 2, "the plan")
    with pytest.raises(CalibrationError, match="layer 0 has 4 query heads over 2 KV heads of 16; this model's has 4"):
        identity.check_sites([SiteShape(4, 4, 16)], "the plan")


def test_weights_of_a_part_or_of_a_larger_model_are_the_same_weights() -> None:
    a, b, c = torch.randn(3, 40, 7).unbind()
    identity = ModelIdentity("Model", (), tuple(fingerprints([a, b])))
    for tensors in ([a], [a, b], [a, b, c, torch.ones(3)], [a.bfloat16(), b]):
        identity.check_weights(tensors, "the plan")
    with pytest.raises(CalibrationError, match="1 of the 2 matrices"):
        identity.check_weights([a, c], "the plan")


def test_two_plans_in_one_process_do_not_know_of_each_other(path: Path) -> None:
    """Another plan under the same path, with the same model class: neither graphs nor caches are shared."""
    other = torchaccel.calibrate(build("llama", layers=1), "cskv", [prompt(2, 40, seed=9)], {"key_density": 0.1})
    inputs = prompt(1, 70)

    def answers() -> torch.Tensor:
        return greedy(torchaccel.compile(build("llama", layers=1), gate=False, **asked(str(path))), inputs, 24)

    first = answers()
    other.save(path)
    second = answers()
    assert not torch.equal(first, second)
    torch._dynamo.reset()
    assert torch.equal(second, answers())


def test_only_calibrated_methods_are_calibrated() -> None:
    model = build("llama", layers=1)
    with pytest.raises(CalibrationError, match=r"asked to calibrate 'int8'.*cskv"):
        torchaccel.calibrate(model, "int8", [prompt(1, 8)])
    with pytest.raises(CalibrationError, match="with no text at all"):
        torchaccel.calibrate(model, "cskv", [])
    with pytest.raises(OptionsError, match=r"cskv\.key_density"):
        torchaccel.calibrate(model, "cskv", [prompt(1, 8)], {"key_density": 2.0})
