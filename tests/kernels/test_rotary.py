"""Rotary embedding inside attention: the reference against its definition, the others against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import composed, ops, problem, reference, rotary
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.cpp import attention
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec

from tests.kernels.cpp_support.cases import Inputs, assert_same, inputs, random_mask, spec

SPECS = {
    "f32_half": spec("float32", 64, 3, rotary="half", rotary_dim=64),
    "bf16_int8_partial_bool": spec("bfloat16", 42, 2, "int8", "int8", mask="bool", rotary="half", rotary_dim=10),
    "f32_int8_pairs_positions": spec(
        "float32", 80, 4, "int8", "int8", positions=True, rotary="interleaved", rotary_dim=24
    ),
}
compiled = pytest.mark.skipif(
    attention.supports(SPECS["f32_half"]) is not None, reason=str(attention.supports(SPECS["f32_half"]))
)


def tables(case: AttentionSpec, rows: int, new: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random ones, whose halves differ as those of no model do; a row of them is not contiguous."""
    both = torch.randn(2, new, rows, 2 * case.rotary_dim).to(dtype).transpose(1, 2)[..., ::2]
    return both[0], both[1]


def assert_rotates(case: Inputs, cos: Tensor, sin: Tensor, *, stored: int) -> None:
    """The generated kernel and the composition against the reference: results and everything stored."""
    arguments = (None, None, cos, sin)
    expected = case.run(lambda *args: reference.decode_attention(case.spec, *args, *arguments))
    kernel = attention.decode_attention(case.spec)
    assert_same(case, case.run(lambda *args: kernel(*args, *arguments)), expected, stored)
    stock = case.run(lambda *args: composed.decode_attention(case.spec, *args, *arguments))
    assert_same(case, stock, expected, stored)
    plain = replace(case.spec, rotary="none", rotary_dim=0)
    unrotated = case.run(lambda *args: reference.decode_attention(plain, *args))
    assert stored == 1 or (unrotated[0].float() - expected[0].float()).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [6, 42])
def test_the_reference_rotates_pairs_by_their_angle(dim: int, dtype: torch.dtype) -> None:
    """Pairs as complex numbers times exp(i angle), whichever two channels a pair is."""
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 42).to(dtype), torch.rand(1, 5, dim // 2) * 6
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    halves, pairs = (slice(dim // 2), slice(dim // 2, dim)), (slice(0, dim, 2), slice(1, dim, 2))
    for style, (first, second) in (("half", halves), ("interleaved", pairs)):
        case = spec("float32", 42, 1, rotary=style, rotary_dim=dim)
        both = torch.empty(2, 1, 5, dim)
        both[..., first] = both[..., second] = torch.stack((angle.cos(), angle.sin()))
        got = rotary.rotated(case, x, *both)
        want = torch.complex(x[..., first].float(), x[..., second].float()) * turn
        assert got.dtype == dtype and torch.equal(got[..., dim:], x[..., dim:])
        for part, exact in ((first, want.real), (second, want.imag)):
            torch.testing.assert_close(got[..., part].float(), exact.to(dtype).float(), atol=1e-6, rtol=8e-3)


def test_in_float32_it_is_what_models_write() -> None:
    """Bit for bit x * cos + rotate_half(x) * sin."""
    torch.manual_seed(0)
    case, x = SPECS["f32_half"], torch.randn(2, 3, 5, 64)
    cos, sin = (table[:, None] for table in tables(case, 2, 5))
    want = x * cos + torch.cat((-x[..., 32:], x[..., :32]), -1) * sin
    assert torch.equal(rotary.rotated(case, x, cos[:, 0], sin[:, 0]), want)


@compiled
@pytest.mark.parametrize(("length", "new"), [(0, 1), (123, 1), (6, 30), (42, 30)])
@pytest.mark.parametrize("name", SPECS)
def test_matches_the_reference(name: str, length: int, new: int) -> None:
    case = inputs(SPECS[name], batch=2, length=length, new=new)
    if case.spec.positions:
        case.lens[2] = 2 * length + 5
        case.positions = torch.full((2, 1, length + 200), -7, dtype=torch.int32)
        case.positions[..., :length] = torch.randperm(2 * length + 5)[:length].sort().values.int()
    case.mask = random_mask(case.spec, 2, 1, new, int(case.lens[2]) + new)
    for rows, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        assert_rotates(case, *tables(case.spec, rows, new, dtype), stored=length + new)


@compiled
def test_of_a_static_cache_only_the_queries_are_rotated() -> None:
    case = inputs(SPECS["f32_half"], length=50)
    case.k_new = case.v_new = None
    assert_rotates(case, *tables(case.spec, 1, 1), stored=50)


@compiled
def test_any_strides() -> None:
    """q and k_new whose channels are apart, float64 tables."""
    case = inputs(SPECS["f32_half"], batch=2, length=42, new=3)
    assert case.k_new is not None
    case.q, case.k_new = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (case.q, case.k_new))
    assert_rotates(case, *tables(case.spec, 2, 3, torch.float64), stored=45)


@compiled
def test_what_a_new_key_says_stays_in_its_sequence() -> None:
    case = inputs(SPECS["f32_half"], batch=2, length=100)
    assert case.k_new is not None
    case.k_new[1, 0, 0, 3] = torch.nan
    kernel = attention.decode_attention(case.spec)
    got = case.run(lambda *args: kernel(*args, None, None, *tables(case.spec, 2, 1)))[0]
    assert got[1, : case.spec.group].isnan().all() and not got[0].isnan().any()


def test_tables_are_checked() -> None:
    case = SPECS["f32_half"]
    x, (cos, sin) = torch.randn(2, 3, 5, 64), tables(case, 2, 5)
    for given, reason in (
        ((None, sin), "needs cos and sin"),
        ((cos, sin[:1]), "cos and sin must be of shape"),
        ((cos[:, :4], sin[:, :4]), r"\[2 or 1, 5, 64\]; found \[2, 4, 64\]"),
        ((cos[..., :32], sin[..., :32]), "64"),
    ):
        with pytest.raises(ValueError, match=reason):
            rotary.rotated(case, x, *given)


@pytest.mark.parametrize("dim", [0, 7, 66])
def test_what_cannot_be_rotated_has_a_reason(dim: int) -> None:
    bad = replace(SPECS["f32_half"], rotary_dim=dim)
    assert f"an even number of channels is rotated, 2 to 64; found rotary_dim {dim}" in (attention.supports(bad) or "")
    assert "phase 'decode' only" in (rotary.refused(replace(SPECS["f32_half"], phase="prefill")) or "")


def test_keys_of_specs_that_do_not_rotate_are_what_they_were() -> None:
    plain = spec("float32", 64, 3)
    assert "rotary" not in plain.key() and AttentionSpec.from_key(plain.key()) == plain
    assert AttentionSpec.from_key(SPECS["f32_half"].key()) == SPECS["f32_half"]


def test_the_operator() -> None:
    ops.library()
    case = SPECS["f32_half"]
    args: list[Any] = list(problem.make(case, {"B": 2, "H_kv": 2, "Q": 3, "S": 20}, torch.device("cpu"), 0))
    for buf in args[3:5]:
        buf[:, :, 17:] = 0.0  # opcheck compares what is never read, too
    plan = Plan(case, ((None, Candidate("reference")),)).key()
    call = (*args[:8], *args[10:], plan)
    torch.library.opcheck(torch.ops.torchaccel.attend_rotary.default, call)
    fresh = problem.copied(tuple(args))
    assert torch.equal(torch.ops.torchaccel.attend_rotary(*call), reference.decode_attention(case, *fresh))
