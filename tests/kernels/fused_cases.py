"""Fused programs and their inputs, for the tests of every implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchaccel.kernels.fused_spec import (
    Activation,
    Add,
    Concat,
    FusedSpec,
    Gather,
    Input,
    Linear,
    Multiply,
    Norm,
    Output,
    Rope,
    Scale,
    Slice,
    Step,
)
from torchaccel.kernels.spec import DTYPES


class Builder:
    """Writes a spec down step by step; every method returns the number of the value it adds."""

    def __init__(self, dtype: str, rows: int):
        self.dtype, self.rows = dtype, rows
        self.inputs: list[Input] = []
        self.steps: list[Step] = []

    def input(self, kind: str, *shape: int) -> int:
        assert not self.steps, "inputs come first"
        self.inputs.append(Input(kind, shape))  # type: ignore[arg-type]
        return len(self.inputs) - 1

    def step(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.inputs) + len(self.steps) - 1

    def spec(self, *outputs: tuple[int, tuple[int, ...]]) -> FusedSpec:
        found = tuple(Output(value, shape) for value, shape in outputs)
        return FusedSpec(self.dtype, self.rows, tuple(self.inputs), tuple(self.steps), found)


def between_attentions(dtype: str, rows: int, act: Any = "silu", d: int = 72, ff: int = 100) -> FusedSpec:
    """From one layer's attention to the next one's: projection, residual, gated MLP, residual, norm, q, k, v, RoPE."""
    b, head = Builder(dtype, rows), 24
    x, residual = b.input("rows", rows, d), b.input("rows", rows, d)
    o, gate, up, down = (b.input("weight", *s) for s in ((d, d), (ff, d), (ff, d), (d, ff)))
    q, k, v = (b.input("weight", n, d) for n in (d, head, head))
    first, second = b.input("vector", d), b.input("vector", d)
    cos, sin = b.input("table", 1, head), b.input("table", 1, head)
    h = b.step(Add(residual, b.step(Linear(x, o))))
    n = b.step(Norm(h, "rms", d, 1e-6, first))
    hidden = b.step(Multiply(b.step(Activation(b.step(Linear(n, gate)), act)), b.step(Linear(n, up))))  # type: ignore[arg-type]
    h2 = b.step(Add(h, b.step(Linear(hidden, down))))
    n2 = b.step(Norm(h2, "rms", d, 1e-6, second))
    qs, ks, vs = (b.step(Linear(n2, w)) for w in (q, k, v))
    qr, kr = b.step(Rope(qs, cos, sin)), b.step(Rope(ks, cos, sin))
    return b.spec((h2, (rows, 1, d)), (qr, (rows, 3, 1, head)), (kr, (rows, 1, 1, head)), (vs, (rows, 1, 1, head)))


def layer_norm_mlp(dtype: str, rows: int, d: int = 65, ff: int = 130) -> FusedSpec:
    """Layer norm with bias, two layers with bias and GELU between, weight stored by columns in the second."""
    b = Builder(dtype, rows)
    x = b.input("rows", rows, d)
    weight, bias = b.input("vector", d), b.input("vector", d)
    up, up_bias = b.input("weight", ff, d), b.input("vector", ff)
    down, down_bias = b.input("weight", ff, d), b.input("vector", d)
    n = b.step(Norm(x, "layer", d, 1e-5, weight, bias))
    hidden = b.step(Activation(b.step(Linear(n, up, up_bias)), "gelu"))
    y = b.step(Linear(hidden, down, down_bias, by_columns=True))
    return b.spec((b.step(Add(x, y)), (rows, d)), (n, (rows, d)))


def packed_heads(dtype: str, rows: int, heads: int = 3, d: int = 20) -> FusedSpec:
    """Heads that lie q, k, v in one projection, norms of single heads with an offset, partial rotary embedding."""
    b = Builder(dtype, rows)
    x, index = b.input("rows", 9, 50), b.input("index", rows)
    weight, scale = b.input("weight", heads * 3 * d, 50), b.input("vector", d)
    cos, sin = b.input("table", rows, d // 2), b.input("table", rows, d // 2)
    packed = b.step(Linear(b.step(Gather(x, index)), weight))
    q, k, v = (b.step(Slice(packed, 3 * d, i * d, d)) for i in range(3))
    q = b.step(Norm(q, "rms", d, 1e-6, scale, offset=1.0))
    rotated = b.step(Rope(b.step(Slice(q, d, 0, d // 2)), cos, sin))
    passed = b.step(Slice(q, d, d // 2, d // 2))
    joined = b.step(Concat((rotated, passed), heads))
    shape = (rows, heads, 1, d)
    return b.spec((b.step(Scale(joined, 0.25)), shape), (k, shape), (v, shape))


CASES = {"between_attentions": between_attentions, "layer_norm_mlp": layer_norm_mlp, "packed_heads": packed_heads}


def tensors(spec: FusedSpec, seed: int = 0) -> list[Tensor]:
    """Random inputs of a spec, weights small enough that sums stay near one."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for item in spec.inputs:
        if item.kind == "index":
            found.append(torch.randint(0, 9, item.shape, generator=generator))
            continue
        value = torch.randn(item.shape, generator=generator)
        if item.kind == "weight":
            value = value / min(item.shape) ** 0.5
        found.append(value.to(DTYPES[spec.dtype]))
    return found
