"""The GPU cases of fused rows, few-row layers, whole and in part, and gathers, next to the same in stock operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import Bench, compare
from torch import Tensor
from torchaccel.kernels import fused_reference, gather_reference, reference, sparse_reference
from torchaccel.kernels.fused_spec import Activation, Add, FusedSpec, Input, Linear, Multiply, Norm, Output
from torchaccel.kernels.gather_spec import GatherSpec, TokenItem
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import LinearSpec
from torchaccel.kernels.triton import fused, gather_tokens, linear, sparse_mlp, threshold_linear

WIDTH, HIDDEN, EPS = 4096, 14336, 1e-6


def cases(bench: Bench, batch: int, only: str) -> Iterator[dict[str, Any]]:
    """Results of every case whose name contains ``only``, for ``batch`` rows; what has no linear layer for 4096."""
    if only in "rows_mlp" and batch <= 16:
        yield {"kind": "rows_mlp", "batch": batch} | program(bench, mlp(batch), stock_mlp)
    if only in "rows_add_norm":
        yield {"kind": "rows_add_norm", "batch": 4096} | program(bench, add_norm(4096), stock_add_norm)
    if only in "rows_linear" and batch <= 16:
        yield {"kind": "rows_linear", "batch": batch} | products(bench, batch)
    if only in "rows_sparse_mlp" and batch <= 16:
        yield {"kind": "rows_sparse_mlp", "batch": batch} | half_of_the_neurons(bench, batch)
    if only in "rows_threshold" and batch <= 16:
        yield {"kind": "rows_threshold", "batch": batch} | half_of_the_inputs(bench)
    if only in "rows_gather":
        yield {"kind": "rows_gather", "batch": 1} | half_of_the_tokens(bench)


def mlp(rows: int) -> FusedSpec:
    """Norm, gated MLP and residual."""
    shapes = ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    inputs = (Input("rows", (rows, WIDTH)), Input("vector", (WIDTH,)), *(Input("weight", shape) for shape in shapes))
    steps = (
        Norm(0, "rms", WIDTH, EPS, 1),
        *(Linear(5, 2), Activation(6, "silu"), Linear(5, 3), Multiply(7, 8)),
        *(Linear(9, 4), Add(0, 10)),
    )
    return FusedSpec("bfloat16", rows, inputs, steps, (Output(11, (rows, WIDTH)),))


def stock_mlp(x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """``mlp`` in stock operators."""
    h = F.rms_norm(x, (WIDTH,), weight, EPS)
    return [x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)]


def add_norm(rows: int) -> FusedSpec:
    """A residual and the norm of it, both returned."""
    inputs = (Input("rows", (rows, WIDTH)), Input("rows", (rows, WIDTH)), Input("vector", (WIDTH,)))
    steps = (Add(0, 1), Norm(3, "rms", WIDTH, EPS, 2))
    return FusedSpec("bfloat16", rows, inputs, steps, (Output(3, (rows, WIDTH)), Output(4, (rows, WIDTH))))


def stock_add_norm(x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """``add_norm`` in stock operators."""
    h = x + y
    return [h, F.rms_norm(h, (WIDTH,), weight, EPS)]


def program(bench: Bench, spec: FusedSpec, stock: Callable[..., list[Tensor]]) -> dict[str, Any]:
    """Check and time a fused program, and the same compiled by Inductor."""
    inputs = [_numbers(item.shape, item.kind == "weight") for item in spec.inputs]
    run = fused.fused(spec)
    expected = fused_reference.fused(spec, [x.cpu() for x in inputs])
    agreement = compare(tuple(run(inputs)), tuple(expected))
    compiled = torch.compile(stock, dynamic=False)
    moved = sum(x.nbytes for x in (*inputs, *expected))
    line = {**agreement, **bench.roofline(bench.ms(lambda: run(inputs)), read=moved)}
    return line | {
        "inductor_ms": bench.ms(lambda: compiled(*inputs)),
        "launch_us": bench.launch_us(lambda: run(inputs)),
    }


def products(bench: Bench, rows: int) -> dict[str, Any]:
    """Check and time the projections to q, k and v of a few rows, and cuBLAS on them."""
    x, weights = _numbers((rows, WIDTH)), [_numbers((n, WIDTH), True) for n in (WIDTH, 1024, 1024)]
    run, none = linear.linear(LinearSpec("bfloat16", rows, False)), [None] * 3
    expected = reference.linear(x.cpu(), [w.cpu() for w in weights], none)
    agreement = compare(tuple(run(x, weights, none)), tuple(expected))
    ms = bench.ms(lambda: run(x, weights, none))
    line = {**agreement, **bench.roofline(ms, read=sum(w.nbytes for w in weights))}
    return line | {"stock_ms": bench.ms(lambda: [F.linear(x, w) for w in weights])}


def half_of_the_neurons(bench: Bench, rows: int) -> dict[str, Any]:
    """Check and time a gated MLP over half of its neurons."""
    spec = SparseMlpSpec("bfloat16", rows, "silu")
    gate, up, down = _numbers((HIDDEN, WIDTH), True), _numbers((HIDDEN, WIDTH), True), _numbers((WIDTH, HIDDEN), True)
    weights = sparse_reference.by_neuron(gate, up, down)
    neurons = torch.randperm(HIDDEN, device="cuda")[None, : HIDDEN // 2].int().sort().values
    x, run = _numbers((rows, WIDTH)), sparse_mlp.sparse_mlp(spec)
    expected = sparse_reference.sparse_mlp(spec, x.cpu(), *(w.cpu() for w in weights), neurons.cpu())
    agreement = compare((run(x, *weights, neurons),), (expected,))
    ms = bench.ms(lambda: run(x, *weights, neurons))
    return {**agreement, **bench.roofline(ms, read=3 * gate.nbytes / 2)}


def half_of_the_inputs(bench: Bench) -> dict[str, Any]:
    """Check and time a down projection of one row that leaves out every input below the median."""
    x, weight = _numbers((1, HIDDEN)), _numbers((HIDDEN, WIDTH), True)
    threshold = x.float().abs().median().reshape(1)
    run = threshold_linear.threshold_linear(ThresholdLinearSpec("bfloat16", 1, False))
    expected = sparse_reference.threshold_linear(x.cpu(), [weight.cpu()], [None], [threshold.cpu()])
    agreement = compare(tuple(run(x, [weight], [None], [threshold])), tuple(expected))
    ms = bench.ms(lambda: run(x, [weight], [None], [threshold]))
    return {**agreement, **bench.roofline(ms, read=weight.nbytes / 2)}


def half_of_the_tokens(bench: Bench) -> dict[str, Any]:
    """Check and time taking half of 4096 tokens of hidden states, a rotary table and a mask."""
    tokens = 4096
    spec = GatherSpec((TokenItem(1, 2), TokenItem(1, 2), TokenItem(2, 1, True)))
    inputs = [_numbers((1, tokens, WIDTH)), _numbers((1, tokens, 128))]
    inputs.append(_numbers((1, 1, tokens, tokens)) > 0)
    index = torch.randperm(tokens, device="cuda")[None, : tokens // 2].sort().values
    run = gather_tokens.gather_tokens(spec)
    expected = gather_reference.gather_tokens(spec, [x.cpu() for x in inputs], index.cpu())
    agreement = compare(tuple(run(inputs, index)), tuple(expected))
    ms = bench.ms(lambda: run(inputs, index))
    compiled = torch.compile(gather_reference.gather_tokens, dynamic=False)
    moved = 2 * sum(x.nbytes for x in expected)
    return {**agreement, **bench.roofline(ms, read=moved)} | {
        "inductor_ms": bench.ms(lambda: compiled(spec, inputs, index))
    }


def _numbers(shape: tuple[int, ...], is_weight: bool = False) -> Tensor:
    """Normal bfloat16 numbers on the GPU; weights so small that sums stay near one."""
    scale = shape[-1] ** -0.5 if is_weight else 1.0
    return (torch.randn(shape, device="cuda") * scale).bfloat16()
