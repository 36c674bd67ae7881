"""Fused programs: the specs, and the generated C++ against the reference."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torchaccel.kernels import fused_reference
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.cpp import fused
from torchaccel.kernels.fused_reference import FUNCTIONS
from torchaccel.kernels.fused_spec import Activation, FusedSpec, Linear

from tests.kernels.fused_cases import CASES, Builder, between_attentions, tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "cpp"
REASON = fused.supports(between_attentions("float32", 1))
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# Relative to the largest element: float32 differs by the order of summation through three layers; the others round what
# enters each layer and what leaves (2^-9, 2^-12), where a value on the other side of a rounding boundary moves a sum.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.2e-2, "float16": 2e-3}


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.is_contiguous()
        scale = max(1.0, theirs.float().abs().max().item())
        assert (mine.float() - theirs.float()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("name", CASES)
def test_a_key_names_one_spec(name: str) -> None:
    spec = CASES[name]("bfloat16", 2)
    assert FusedSpec.from_key(spec.key()) == spec
    assert CASES[name]("bfloat16", 3).key() != spec.key()


@needs_compiler
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "rows"), [("float32", 1), ("float32", 3), ("bfloat16", 1), ("bfloat16", 8), ("float16", 2)]
)
def test_matches_the_reference(name: str, dtype: str, rows: int) -> None:
    spec = CASES[name](dtype, rows)
    given = tensors(spec)
    assert_close(fused.fused(spec)(given), fused_reference.fused(spec, given), TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations(function: str) -> None:
    spec = between_attentions("float32", 1, function)
    given = tensors(spec)
    assert_close(fused.fused(spec)(given), fused_reference.fused(spec, given), TOLERANCE["float32"])


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_threads_and_neighbours_change_nothing(name: str) -> None:
    one, three = CASES[name]("bfloat16", 1), CASES[name]("bfloat16", 3)
    given = tensors(three)
    alone = [
        x[1:2] if item.kind != "weight" and len(x) == 3 else x for x, item in zip(given, three.inputs, strict=True)
    ]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(fused.fused(three)(given))
        row = fused.fused(one)(alone)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # Rows are summed in another order where several are read together.
    assert_close(row, [y[1:2] for y in results[0]], TOLERANCE["bfloat16"])


@needs_compiler
@pytest.mark.parametrize("by_columns", [False, True])
def test_small_elements_count_as_zero_above_a_threshold_only(by_columns: bool) -> None:
    def spec(threshold: float | None) -> FusedSpec:
        b = Builder("bfloat16", 2)
        x, weight = b.input("rows", 2, 70), b.input("weight", *((70, 40) if by_columns else (40, 70)))
        return b.spec((b.step(Linear(x, weight, None, by_columns, threshold)), (2, 40)))

    given = tensors(spec(None))
    given[0][:, ::2] = 0
    exact, zeros, sparse = (fused.fused(spec(t))(given) for t in (None, 0.0, 0.7))
    assert torch.equal(exact[0], zeros[0])
    assert_close(sparse, fused_reference.fused(spec(0.7), given), TOLERANCE["bfloat16"])
    masked = [torch.where(given[0].abs() <= 0.7, 0.0, given[0]), given[1]]
    assert torch.equal(sparse[0], fused.fused(spec(None))(masked)[0]) and not torch.equal(sparse[0], exact[0])
    # Rows of zeros are not read: what stands there does not matter, which it does where nothing may be left out.
    if by_columns:
        given[1][::2] = torch.nan
        assert (
            torch.equal(fused.fused(spec(0.0))(given)[0], exact[0]) and fused.fused(spec(None))(given)[0].isnan().all()
        )


@needs_compiler
def test_rows_of_any_strides_and_rows_that_do_not_exist() -> None:
    spec = CASES["packed_heads"]("float32", 2)
    given = tensors(spec)
    expected = fused.fused(spec)(given)
    assert_close(fused.fused(spec)([given[0].T.contiguous().T, *given[1:]]), expected, 0.0)
    given[1] = torch.tensor([9, -1])
    assert all(y.isnan().all() for y in fused.fused(spec)(given))


@needs_compiler
def test_nan_propagates() -> None:
    for function in ("silu", "relu", "gelu"):
        spec = between_attentions("bfloat16", 1, function)
        given = tensors(spec)
        given[0][0, 3] = torch.nan
        assert all(y.isnan().all() for y in fused.fused(spec)(given))


def test_errors_name_what_was_found() -> None:
    spec = between_attentions("bfloat16", 1)
    assert "1 to 8 rows" in (fused.supports(between_attentions("bfloat16", 9)) or "")
    assert "knows the dtypes" in (fused.supports(replace(spec, dtype="float64")) or "")
    assert "found none" in (fused.supports(replace(spec, steps=(Activation(0, "silu"),), outputs=())) or "")
    wide = between_attentions("bfloat16", 8, ff=40000)
    assert "values between the layers" in (fused.supports(wide) or "")
    with pytest.raises(ValueError, match="1 to 8 rows"):
        fused.fused(between_attentions("bfloat16", 9))


@needs_compiler
def test_inputs_are_checked() -> None:
    spec = between_attentions("bfloat16", 1)
    given = tensors(spec)
    kernel = fused.fused(spec)
    with pytest.raises(ValueError, match=r"input 0 .* 72 elements of torch\.bfloat16; found .*float32"):
        kernel([given[0].float(), *given[1:]])
    with pytest.raises(ValueError, match="input 1 of the kernel has 72 elements"):
        kernel([given[0], given[1][:, :3], *given[2:]])
    with pytest.raises(ValueError, match="input 2 must be contiguous"):
        kernel([*given[:2], given[2].T, *given[3:]])


@pytest.mark.parametrize("name", CASES)
def test_golden_source(name: str) -> None:
    """``TORCHACCEL_UPDATE_GOLDEN=1`` rewrites the files after a deliberate change."""
    path = GOLDEN / f"fused_{name}.cpp.expected"
    text = fused.source(CASES[name]("bfloat16", 1))
    if os.environ.get("TORCHACCEL_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()
    assert "{{ " not in text and "{% " not in text and str(Path.home()) not in text


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_avx2(name: str) -> None:
    """The same source built for 256-bit vectors."""
    spec = CASES[name]("bfloat16", 2)
    given = tensors(spec)
    with config.patch({"cpp.simdlen": 256}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "compile_source", toolchain.compile_source.__wrapped__)
        narrow = fused.fused.__wrapped__(spec)
    assert_close(narrow(given), fused_reference.fused(spec, given), TOLERANCE["bfloat16"])
