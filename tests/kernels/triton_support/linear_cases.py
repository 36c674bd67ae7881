"""Cases of few-row linear layers that share an input, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchaccel.kernels import reference
from torchaccel.kernels.spec import DTYPES, LinearSpec
from torchaccel.kernels.triton.linear import linear

from .decode_cases import difference

# Rounding of the result; float32 is summed in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


@dataclass(frozen=True)
class LinearCase:
    """``rows`` rows of ``columns``, strided, times three weights; the first and the last have a bias."""

    name: str
    dtype: str
    rows: int
    columns: int


LINEAR_CASES = [
    LinearCase("linear_bfloat16", "bfloat16", 1, 777),
    LinearCase("linear_float32", "float32", 16, 123),
    LinearCase("linear_float16_narrow", "float16", 3, 6),
    LinearCase("linear_no_rows", "bfloat16", 0, 42),
]


def run_linear_case(case: LinearCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

    x = numbers(1, case.rows, case.columns, 2)[..., 1]
    weights, biases = [numbers(n, case.columns) for n in (42, 64, 1)], [numbers(42), None, numbers(1)]
    moved = [[None if t is None else t.to(device) for t in tensors] for tensors in (weights, biases)]
    got = linear(LinearSpec(case.dtype, case.rows or 4, True))(x.to(device), *moved)
    for number, (y, expected) in enumerate(zip(got, reference.linear(x, weights, biases), strict=True)):
        if not case.rows and y.shape == expected.shape:
            continue
        if found := difference(f"result {number}", y.cpu(), expected, TOLERANCE[case.dtype]):
            return found
    return None
