"""The generated C++ linear layers of a few rows against the reference."""

from __future__ import annotations

import pytest
import torch
from torchaccel.kernels import reference
from torchaccel.kernels.cpp import linear
from torchaccel.kernels.spec import DTYPES, LinearSpec

pytestmark = pytest.mark.skipif(
    linear.supports(LinearSpec("float32", 1, False)) is not None,
    reason=str(linear.supports(LinearSpec("float32", 1, False))),
)

# Relative to the size of a sum of K = 1000 products, about 32: float32 differs by the order of summation, the others by
# one rounding of the result (2^-8, 2^-11).
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.mark.parametrize("columns", [1, 64, 777, 1000])
@pytest.mark.parametrize(("dtype", "rows"), [("float32", 3), ("bfloat16", 1), ("bfloat16", 8), ("float16", 2)])
def test_matches_the_reference(dtype: str, rows: int, columns: int) -> None:
    torch.manual_seed(columns)
    kernel = linear.linear(LinearSpec(dtype, rows, True))
    weights = [torch.randn(n, columns).to(DTYPES[dtype]) for n in (5, 64, 1)]
    biases = [torch.randn(5).to(DTYPES[dtype]), None, torch.randn(1).to(DTYPES[dtype])]
    wide = torch.randn(rows, columns, 2).to(DTYPES[dtype])
    for x in (wide[..., 0].contiguous(), wide[..., 1], wide[:1, :, 1][None]):
        for got, expected in zip(kernel(x, weights, biases), reference.linear(x, weights, biases), strict=True):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            scale = max(1.0, expected.float().abs().max().item())
            assert (got.float() - expected.float()).abs().max().item() <= TOLERANCE[dtype] * scale


def test_threads_and_empty_rows() -> None:
    torch.manual_seed(0)
    kernel = linear.linear(LinearSpec("bfloat16", 1, True))
    weights = [torch.randn(n, 1000).bfloat16() for n in (333, 1, 100)]
    x = torch.randn(1, 1000).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(kernel(x, weights, [None, None, None]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [tuple(y.shape) for y in kernel(x[:0], weights, [None] * 3)] == [(0, 333), (0, 1), (0, 100)]


def test_nan_propagates() -> None:
    kernel = linear.linear(LinearSpec("bfloat16", 1, True))
    x = torch.ones(1, 64).bfloat16()
    weights = [torch.ones(3, 64).bfloat16()] * 3
    x[0, 40] = torch.nan
    assert all(y.isnan().all() for y in kernel(x, weights, [None] * 3))


def test_errors_name_what_was_found() -> None:
    assert "1 to 8 rows" in (linear.supports(LinearSpec("bfloat16", 9, False)) or "")
    assert "knows the dtypes" in (linear.supports(LinearSpec("float64", 1, False)) or "")
    with pytest.raises(ValueError, match="1 to 8 rows"):
        linear.linear(LinearSpec("bfloat16", 9, False))
    kernel = linear.linear(LinearSpec("bfloat16", 1, False))
    x, weight = torch.ones(1, 8).bfloat16(), torch.ones(4, 8).bfloat16()
    with pytest.raises(ValueError, match="at most 1 rows; found 2"):
        kernel(x.expand(2, 8), [weight], [None])
    with pytest.raises(ValueError, match="contiguous bfloat16 weights"):
        kernel(x, [torch.ones(8, 4).bfloat16().T], [None])
    with pytest.raises(ValueError, match="bias=False"):
        kernel(x, [weight], [torch.ones(4).bfloat16()])
