"""A gated MLP for one token: all neurons, half of them by a list, and half of the inputs of each layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import registry, sparse_reference
from ...kernels.fused_reference import FUNCTIONS
from ...kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from ...kernels.spec import LinearSpec
from .contender import Contender, Goal, Scenario, copies
from .geometry import DTYPE, Geometry

LAYERS = 4
# Neurons for each column of x, as Llama's.
RATIO = 4
Weights = tuple[Tensor, Tensor, Tensor]


def scenario(g: Geometry, width: int) -> Scenario:
    """One row of ``width`` through ``RATIO * width`` neurons."""
    size = 3.0 * RATIO * width * width * 2
    contents = [_weights(g, width) for _ in range(copies(size, g.device))]
    x = torch.randn(1, width, device=g.device).bfloat16()
    threshold = x.float().abs().median().reshape(1)
    # Outputs of up are about as normal as x: half of the product's inputs lie below its median.
    gate, up, down = contents[0]
    middle = F.silu(x.float() @ gate.float().T) * (x.float() @ up.float().T)
    thresholds = threshold, middle.abs().median().reshape(1)
    half = torch.randperm(RATIO * width, device=g.device)[: RATIO * width // 2].int().sort().values[None]
    mlp = registry.sparse_mlp(SparseMlpSpec(DTYPE, 1, "silu"), g.device.type).run
    found = [Contender("torchaccel:dense", [_dense(g, x, w) for w in contents], size, size)]
    for label, neurons, share in (("all", None, 1.0), ("half", half, 0.5)):
        calls = [partial(mlp, x, *w, neurons) for w in contents]
        found.append(Contender(f"torchaccel:{label}", calls, size * share, size * share, density=share))
    calls = [_thresholds(g, x, w, thresholds) for w in contents]
    found.append(Contender("torchaccel:threshold", calls, size / 2, size / 2, density=0.5))
    truth = middle @ down.float()
    for contender in found[:2]:
        result: Any = contender.calls[0]()
        contender.error = float((result.float() - truth).abs().max())

    def over_dense(label: str) -> Any:
        return lambda ms: ms["torchaccel:dense"] / ms[label]

    goals = [
        Goal(label, "times dense", 1.6, over_dense(label)) for label in ("torchaccel:half", "torchaccel:threshold")
    ]
    return Scenario(f"mlp {width} x {RATIO * width}", found, lambda _: goals, 15, burst=LAYERS)


def _weights(g: Geometry, width: int) -> Weights:
    """Gate, up and transposed down by neuron, normal with a variance that keeps that of x."""
    gate, up = (torch.randn(RATIO * width, width, device=g.device) / width**0.5 for _ in range(2))
    down = torch.randn(width, RATIO * width, device=g.device) / (RATIO * width) ** 0.5
    return sparse_reference.by_neuron(gate.bfloat16(), up.bfloat16(), down.bfloat16())


def _dense(g: Geometry, x: Tensor, weights: Weights) -> Any:
    """Two launches of the few-row layers, as models are lowered."""
    gate, up, down = weights[0].contiguous(), weights[1].contiguous(), weights[2].T.contiguous()
    run = registry.linear(LinearSpec(DTYPE, 1, False), g.device.type).run

    def call() -> Tensor:
        first, second = run(x, [gate, up], [None, None])
        result: Tensor = run(FUNCTIONS["silu"](first) * second, [down], [None])[0]
        return result

    return call


def _thresholds(g: Geometry, x: Tensor, weights: Weights, thresholds: tuple[Tensor, Tensor]) -> Any:
    """The same three layers by inputs, weights stored transposed."""
    gate, up, down = weights[0].T.contiguous(), weights[1].T.contiguous(), weights[2].contiguous()
    run = registry.threshold_linear(ThresholdLinearSpec(DTYPE, 1, False), g.device.type).run
    outer, inner = thresholds

    def call() -> Tensor:
        first, second = run(x, [gate, up], [None, None], [outer, outer])
        result: Tensor = run(FUNCTIONS["silu"](first) * second, [down], [None], [inner])[0]
        return result

    return call
