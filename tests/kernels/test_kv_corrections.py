"""GEAR's corrections and TurboQuant's codebook: the numbers of their specification, and bounds that must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import codebook, kv_format, low_rank, reference, registry, rotation
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec, KVFormat


def again(fmt: KVFormat, x: Tensor) -> Tensor:
    """What is read after ``x`` ``[..., block, D]`` was quantised."""
    return kv_format.dequantise(fmt, *kv_format.quantise(fmt, x))


def error(fmt: KVFormat, x: Tensor) -> float:
    return float((again(fmt, x) - x).norm() / x.norm())


def test_a_token_with_two_outliers() -> None:
    """Both are replaced by the mean 1, so that the range is [0, 2] instead of [-7, 9]: steps of 2/3 instead of 16/3."""
    x = torch.tensor([[0.0, 1.0, 2.0, 9.0, -7.0, 1.0, 0.0, 2.0]])
    fmt = KVFormat("int2", "float32", 8, "token", block=1, outliers=2)
    _, scale, minimum, _, places = kv_format.quantise(fmt, x)
    assert float(scale) == pytest.approx(2 / 3, rel=2e-3) and float(minimum) == 0.0
    assert places.flatten().tolist() == [4, 3]
    # 1 lies between two codes: 2/3 and 4/3 are equally near, and the scale's rounding decides.
    third = again(fmt, x)[0, 1].item()
    assert third == pytest.approx(2 / 3, rel=2e-3) or third == pytest.approx(4 / 3, rel=2e-3)
    expected = torch.tensor([[0.0, third, 2.0, 9.0, -7.0, third, 0.0, 2.0]])
    torch.testing.assert_close(again(fmt, x), expected, atol=5e-3, rtol=0.0)
    _, scale, _ = kv_format.quantise(replace(fmt, outliers=0), x)
    assert float(scale) == pytest.approx(16 / 3, rel=2e-3)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("kind", ["int2", "int4", "int8"])
def test_errors_fall_with_the_rank_to_the_best_possible(kind: Any, axis: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 64, 16)
    plain = KVFormat(kind, "float32", 16, axis)
    lost = x - again(plain, x)
    values = torch.linalg.svdvals(lost)
    found = [error(replace(plain, rank=rank), x) for rank in (0, 2, 4, 16)]
    best = [float(values[:, rank:].norm() / x.norm()) for rank in (0, 2, 4, 16)]
    assert found[0] > found[1] > found[2] > found[3]
    for mine, bound in zip(found[:3], best[:3], strict=True):
        assert bound * 0.999 < mine < bound * 1.05
    # Factors of full rank leave their float16 rounding.
    assert found[3] < 1e-3 * found[0]
    if kind == "int2" and axis == "channel":
        assert found[0] == pytest.approx(0.45, abs=0.06)


def test_power_iteration_of_full_rank_is_exact_and_lower_ranks_are_not_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 42, 6)
    a, b = low_rank.factors(x, 6)
    torch.testing.assert_close(a.mT @ b, x.double(), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(a @ a.mT, torch.eye(6).double().expand(3, -1, -1), atol=1e-12, rtol=0.0)
    thin = torch.randn(42, 1) @ torch.randn(1, 6)
    a, b = low_rank.factors(thin, 4)
    torch.testing.assert_close(a.mT @ b, thin.double(), atol=1e-6, rtol=0.0)
    assert not low_rank.factors(torch.zeros(42, 6), 2)[1].any()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_outliers_are_kept_and_do_not_stretch_the_range(axis: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32)
    # One spike in every channel, and in every token among the first 32: diagonal, so that it fits both axes.
    x[:, range(32), range(32)] += 50.0 * torch.tensor([1.0, -1.0]).repeat(16)
    fmt = KVFormat("int4", "float32", 32, axis, outliers=2, rank=1)
    got = again(fmt, x)
    spikes, kept = x.diagonal(dim1=-2, dim2=-1), got.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(kept, spikes, atol=1e-3, rtol=2**-10)
    rest = x.abs() < 5.0
    assert (got - x)[rest].abs().max() < 0.5 < (again(replace(fmt, outliers=0, rank=0), x) - x)[rest].abs().max()
    # All of a group: exact up to float16.
    every = replace(fmt, outliers=fmt.group_size, rank=0)
    torch.testing.assert_close(again(every, x), x, atol=1e-3, rtol=2**-10)


def test_the_gaussian_tables_are_those_of_lloyd_and_max() -> None:
    assert codebook.gaussian(2) == pytest.approx((-1.51042, -0.45278, 0.45278, 1.51042), abs=1e-5)
    positive = (0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259)
    assert codebook.gaussian(4)[8:] == pytest.approx(positive, abs=1e-5)


def test_a_token_in_the_gaussian_codebook() -> None:
    matrix = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    x = torch.tensor([[4.0, 0.0, 0.0, 3.0]])
    fmt = KVFormat("int2", "float32", 4, "token", block=1, codebook="gaussian")
    codes, scale = kv_format.quantise(fmt, rotation.rotate(x, matrix))
    assert codes.tolist() == [[3, 2, 2, 3]]
    got = rotation.rotate(kv_format.dequantise(fmt, codes, scale), matrix.mT)
    torch.testing.assert_close(got, torch.tensor([[4.402, 0.0, 0.0, 2.371]]), atol=2e-3, rtol=0.0)
    # With the norm itself as the scale: the paper's decoder without the correction of the norm.
    plain = rotation.rotate(kv_format.dequantise(fmt, codes, torch.tensor([5.0]).half()), matrix.mT)
    torch.testing.assert_close(plain, torch.tensor([[4.908, 0.0, 0.0, 2.644]]), atol=2e-3, rtol=0.0)
    assert not again(fmt, torch.zeros(1, 4)).any()
    torch.testing.assert_close(again(fmt, 64 * x), 64 * again(fmt, x))


@pytest.mark.parametrize("dim", [64, 42, 123])
def test_rotations_are_orthogonal_deterministic_and_make_codes_better(dim: int) -> None:
    matrix = rotation.rotation(dim, 3)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim), atol=1e-5, rtol=0.0)
    rotation.rotation.cache_clear()
    assert torch.equal(rotation.rotation(dim, 3), matrix) and not torch.equal(rotation.rotation(dim, 4), matrix)
    torch.manual_seed(0)
    x = torch.randn(64, dim) * torch.linspace(0.1, 4.0, dim) ** 2
    fmt = KVFormat("int2", "float32", dim, "token", codebook="gaussian")
    turned = rotation.rotate(x, matrix)
    assert error(fmt, turned) < 0.37 < error(fmt, x)


def test_attention_over_rotated_tokens_is_that_over_plain_ones() -> None:
    torch.manual_seed(0)
    dense, turns = KVFormat("dense", "float32", 42), KVFormat("int4", "float32", 42, codebook="gaussian")
    spec = AttentionSpec("decode", 42, 3, "float32", dense, dense, 42**-0.5, lse=True)
    k, v = torch.randn(2, 2, 20, 42), torch.randn(2, 2, 20, 42)
    q, k_new, v_new = torch.randn(2, 6, 1, 42), torch.randn(2, 2, 1, 42), torch.randn(2, 2, 1, 42)

    def plain(*args: Any) -> Any:
        return reference.decode_attention(spec, *args)

    want = plain(q, k_new, v_new, k.clone(), v.clone(), torch.tensor([0, 9, 9]), None, None)
    turned = rotation.stored(turns, k), rotation.stored(turns, v)
    assert not torch.allclose(turned[0], k)
    torch.testing.assert_close(rotation.restored(turns, turned[0]), k)
    got = rotation.rotated(plain, turns, turns)(q, k_new, v_new, *turned, torch.tensor([0, 9, 9]), None, None)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="correct codes, which kind 'dense' has not"):
        KVFormat("dense", "float32", 64, rank=2)
    with pytest.raises(ValueError, match="outliers are an even number"):
        KVFormat("int2", "float32", 64, outliers=3)
    with pytest.raises(ValueError, match="as many as a group has values"):
        KVFormat("int2", "float32", 64, group=16, outliers=18)
    with pytest.raises(ValueError, match="codebook 'gaussian' is for kind 'int4' or 'int2', axis 'token'"):
        KVFormat("int4", "float32", 64, "channel", codebook="gaussian")


def test_keys_of_specs_without_the_new_fields_stay_as_they_were() -> None:
    dense, gear = KVFormat("dense", "float32", 64), KVFormat("int2", "float32", 64, rank=2)
    spec = AttentionSpec("decode", 64, 3, "float32", dense, gear, 0.125)
    assert AttentionSpec.from_key(spec.key()) == spec
    assert spec.key().count("rank") == 1 and "outliers" not in spec.key()


def test_a_model_gets_turned_tokens_behind_the_rotary_embedding() -> None:
    """Everything is in the exact tail, so the result is that of a dense cache."""
    torch.manual_seed(0)
    keys = KVFormat("int4", "float32", 42, window=64, codebook="gaussian")
    dense, values = KVFormat("dense", "float32", 42), replace(keys, packing="token")
    spec = AttentionSpec("decode", 42, 3, "float32", keys, values, 42**-0.5, rotary="half", rotary_dim=10, lse=True)
    q, k_new, v_new = torch.randn(2, 6, 5, 42), torch.randn(2, 2, 5, 42), torch.randn(2, 2, 5, 42)
    cos, sin = torch.randn(2, 1, 5, 10).unbind(0)
    lens = torch.tensor([0, 0, 0])

    def run(attend: Any, *formats: KVFormat) -> Any:
        buffers = [kv_format.allocate(fmt, 2, 2, 64, torch.device("cpu")) for fmt in formats]
        return attend(q, k_new, v_new, *buffers, lens, None, None, None, None, cos, sin)

    plan = Plan(spec, ((None, Candidate("reference")),))
    got = run(registry.attend(plan.key()), keys, values)
    plain = replace(spec, key_format=dense, value_format=dense)
    want = run(lambda *args: reference.decode_attention(plain, *args), dense, dense)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
