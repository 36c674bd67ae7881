"""Candidates: every free choice of every generated kernel computes what the reference computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchaccel.kernels import candidates, ops
from torchaccel.kernels.candidates import KERNELS, Candidate, Spec, build, spec_from_key
from torchaccel.kernels.cpp.compile import missing_toolchain
from torchaccel.kernels.pick import Pick
from torchaccel.kernels.selection_spec import SelectionSpec, SummarySpec
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec

from tests.kernels.fused_cases import CASES
from torchaccel.tuning.check import WrongResultError, check

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(missing_toolchain() is not None, reason=str(missing_toolchain()))
DENSE = KVFormat("dense", "float32", 42)
BOUNDS = SelectionSpec(SummarySpec("minmax", 42, "bfloat16", "bfloat16", 16), 3, "bfloat16", 6, sinks=1, recent=1)
LABELS = SelectionSpec(SummarySpec("channels", 64, "float32", "float32", 1, 6), 2, "float32", 33, "mean")
MEANS = SelectionSpec(SummarySpec("mean", 42, "float32", "float32", 16), 3, "float32", 6, "softmax", 0.2, mass=0.7)
SPECS: dict[str, Spec] = {
    "decode_attention": AttentionSpec("decode", 42, 3, "float32", DENSE, DENSE, 42**-0.5),
    "prefill_attention": AttentionSpec("prefill", 42, 3, "float32", DENSE, DENSE, 42**-0.5),
    "linear": LinearSpec("float32", 1, False),
    "fused": CASES["between_attentions"]("bfloat16", 2),
    "select": BOUNDS,
    "sparse_mlp": SparseMlpSpec("bfloat16", 2, "silu"),
    "threshold_linear": ThresholdLinearSpec("float32", 3, True),
}
# The seeds have tests of their own.
CHOICES: dict[str, tuple[Spec, dict[str, int]]] = {
    "linear_bf16": (LinearSpec("bfloat16", 1, True), {"M": 1, "K": 123, "N": 42}),
    "linear_f32_rows": (LinearSpec("float32", 5, False), {"M": 8, "K": 123, "N": 642}),
    "fused_bf16": (CASES["between_attentions"]("bfloat16", 2), {"M": 2}),
    "select_bounds": (BOUNDS, {"B": 2, "H_kv": 3, "Q": 2, "S": 777}),
    "select_labels": (LABELS, {"B": 1, "H_kv": 1, "Q": 1, "S": 30_000}),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_spec_is_read_back_from_its_kernel_and_key(kernel: str) -> None:
    spec = SPECS[kernel]
    assert candidates.kernel_name(spec) == kernel and spec_from_key(kernel, spec.key()) == spec
    with pytest.raises(ValueError, match="decode_attention, prefill_attention"):
        spec_from_key("unknown", spec.key())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_seed_is_first_the_reference_last_and_nothing_is_listed_twice(kernel: str, device: str) -> None:
    found = candidates.candidates(SPECS[kernel], device)
    assert found[-1] == Candidate("reference") and len(set(found)) == len(found)
    assert [Candidate.from_key(candidate.key()) for candidate in found] == list(found)
    if device == "cuda" or missing_toolchain() is None:
        assert found[0].implementation == {"cpu": "cpp", "cuda": "triton"}[device]


@needs_compiler
@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_the_reference(name: str) -> None:
    spec, shape = CHOICES[name]
    choices = [c for c in candidates.candidates(spec, "cpu") if c.implementation == "cpp"]
    assert len(choices) == 3 and choices[0].config == ()
    for choice in choices[1:]:
        check(spec, build(spec, choice), shape, CPU, 7)


@pytest.mark.parametrize("spec", [BOUNDS, LABELS, MEANS], ids=["bounds", "labels", "means"])
def test_a_wrong_choice_of_blocks_is_seen(spec: SelectionSpec) -> None:
    reference = build(spec, Candidate("reference"))
    shape = {"B": 2, "H_kv": 2, "Q": 1, "S": 900}
    assert check(spec, reference, shape, CPU, 3) == 0.0

    def worst(*args: object) -> torch.Tensor:
        index: torch.Tensor = reference(*args)
        index[0, 0, 2] = index[0, 0, 1] + 1 if index[0, 0, 2] > index[0, 0, 1] + 1 else index[0, 0, 2] + 1
        return index

    def twice(*args: object) -> torch.Tensor:
        index: torch.Tensor = reference(*args)
        index[1, 1, 1] = index[1, 1, 0]
        return index

    def beyond(*args: object) -> torch.Tensor:
        index: torch.Tensor = reference(*args)
        index[0, 1, 0] = 900
        return index

    for wrong in (worst, twice, beyond):
        with pytest.raises(WrongResultError):
            check(spec, wrong, shape, CPU, 3)


def test_a_fused_program_that_leaves_a_step_out_is_seen() -> None:
    spec = CASES["layer_norm_mlp"]("float32", 3)
    assert check(spec, build(spec, Candidate("reference")), {"M": 4}, CPU, 0) == 0.0
    assert hasattr(spec.steps[0], "eps")
    other = replace(spec, steps=(replace(spec.steps[0], eps=0.1), *spec.steps[1:]))
    with pytest.raises(WrongResultError, match="is off by"):
        check(spec, build(other, Candidate("reference")), {"M": 4}, CPU, 0)


def test_an_operator_runs_the_candidate_that_it_carries() -> None:
    ops.library()
    spec = LinearSpec("bfloat16", 2, False)
    x, weight = torch.randn(2, 70).bfloat16(), torch.randn(6, 70).bfloat16()
    assert Pick(spec).key() == spec.key() and Pick.from_key("linear", spec.key()) == Pick(spec)
    pick = Pick(spec, Candidate("reference"))
    assert Pick.from_key("linear", pick.key()) == pick
    (got,) = torch.ops.torchaccel.linear_rows(x, [weight], [None], pick.key())
    # Bit for bit, which a kernel that sums in another order is not.
    assert torch.equal(got, torch.nn.functional.linear(x, weight))
