"""Cases of fused programs, those of the other implementations and some of one launch, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchaccel.kernels import fused_reference
from torchaccel.kernels.fused_spec import Activation, Add, FusedSpec, Gather, Linear, Multiply, Norm
from torchaccel.kernels.triton.fused import configs, fused

from tests.kernels.fused_cases import Builder, between_attentions, layer_norm_mlp, packed_heads, tensors

from .decode_cases import difference

# As for the C++ kernels: rounding of what enters a layer, where the other side of a boundary moves a sum.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.2e-2, "float16": 2e-3}


@dataclass(frozen=True)
class FusedCase:
    """A program of ``make`` and what is done to its inputs before it runs; choices: with each of its configs."""

    name: str
    make: Callable[..., FusedSpec]
    dtype: str = "bfloat16"
    rows: int = 2
    function: str = ""
    choices: bool = False

    def spec(self) -> FusedSpec:
        """The spec of the case."""
        return self.make(self.dtype, self.rows, *([self.function] if self.function else []))


def add_norm(dtype: str, rows: int, width: int = 123) -> FusedSpec:
    """What stands between two layers of any number of rows: gathered residual, sum, norm, a gate. One launch."""
    b = Builder(dtype, rows)
    x, residual, index = b.input("rows", rows, width), b.input("rows", 9, width), b.input("index", rows)
    weight, gate = b.input("vector", width), b.input("rows", rows, width)
    h = b.step(Add(b.step(Gather(residual, index)), x))
    n = b.step(Norm(h, "rms", width, 1e-6, weight, offset=1.0))
    y = b.step(Multiply(b.step(Activation(gate, "tanh")), n))  # type: ignore[arg-type]
    return b.spec((h, (rows, width)), (y, (rows, width)))


def thresholds(dtype: str, rows: int) -> FusedSpec:
    """Both orders of a weight, with small elements left out."""
    b = Builder(dtype, rows)
    x, up, down = b.input("rows", rows, 70), b.input("weight", 40, 70), b.input("weight", 40, 42)
    hidden = b.step(Linear(x, up, threshold=0.7))
    return b.spec((b.step(Linear(hidden, down, by_columns=True, threshold=0.5)), (rows, 42)), (hidden, (rows, 40)))


FUSED_CASES = [
    FusedCase("fused_between_attentions", between_attentions, rows=1),
    FusedCase("fused_between_attentions_float32", between_attentions, "float32", 3, "gelu_tanh"),
    FusedCase("fused_layer_norm_mlp", layer_norm_mlp, "float32", 16),
    FusedCase("fused_packed_heads", packed_heads, "float16"),
    FusedCase("fused_packed_heads_bfloat16", packed_heads, rows=6),
    FusedCase("fused_add_norm", add_norm, rows=42),
    FusedCase("fused_thresholds", thresholds, "float32"),
    FusedCase("fused_choices", between_attentions, "float32", 3, choices=True),
    FusedCase("fused_choices_of_one_launch", add_norm, rows=6, choices=True),
]


def run_fused_case(case: FusedCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    spec = case.spec()
    given = tensors(spec)
    expected = fused_reference.fused(spec, given)
    if case.make is thresholds:
        # Weights that no row needs are not read: what stands there does not matter.
        x = given[0] * (given[0].abs() > 0.7) @ given[1].T
        unread = (x.abs() <= 0.5).all(0)
        given[2][unread] = torch.nan
        if not unread.any():
            return "the case leaves nothing out"
    if spec.inputs[0].kind == "rows":
        # Any strides.
        given[0] = given[0].T.contiguous().T
    for changes in configs(spec) if case.choices else ((),):
        got = fused(spec, **dict(changes))([x.to(device) for x in given])
        for place, (x, y) in enumerate(zip(got, expected, strict=True)):
            if x.shape != y.shape or x.dtype != y.dtype or not x.is_contiguous():
                return f"output {place} is {x.dtype} {list(x.shape)} with {dict(changes)}"
            if found := difference(f"output {place} with {dict(changes)}", x.cpu(), y, TOLERANCE[case.dtype]):
                return found
    return None
