"""Cases of MLPs over some neurons and of linear layers above a threshold, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchaccel.kernels import sparse_reference
from torchaccel.kernels.fused_spec import ActivationName
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import DTYPES
from torchaccel.kernels.triton import sparse_mlp, threshold_linear

from .decode_cases import difference

# As for linear layers; the middle of an MLP is rounded, where the other side of a boundary moves a sum.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.2e-2, "float16": 2e-3}


@dataclass(frozen=True)
class SparseMlpCase:
    """``rows`` rows of ``width`` and ``neurons`` neurons, of which ``listed`` are in each of ``lists`` lists."""

    name: str
    dtype: str = "bfloat16"
    rows: int = 1
    width: int = 64
    neurons: int = 123
    lists: int = 0
    listed: int = 42
    activation: ActivationName = "silu"

    def spec(self) -> SparseMlpSpec:
        """The spec of the case."""
        return SparseMlpSpec(self.dtype, self.rows, self.activation)


@dataclass(frozen=True)
class ThresholdCase:
    """``rows`` rows of ``inputs`` to ``outputs``; each: whether every input has a threshold of its own."""

    name: str
    dtype: str = "bfloat16"
    rows: int = 1
    inputs: int = 123
    outputs: int = 42
    each: bool = False

    def spec(self) -> ThresholdLinearSpec:
        """The spec of the case."""
        return ThresholdLinearSpec(self.dtype, self.rows, True)


SPARSE_MLP_CASES = [
    SparseMlpCase("sparse_mlp_all"),
    SparseMlpCase("sparse_mlp_one_list", "float32", 3, 123, lists=1, activation="gelu_tanh"),
    SparseMlpCase("sparse_mlp_own_lists", "float16", 3, 42, 777, lists=3, listed=600, activation="gelu"),
    SparseMlpCase("sparse_mlp_tiny", "float32", 8, 6, 5, lists=8, listed=3, activation="relu"),
]
THRESHOLD_CASES = [
    ThresholdCase("threshold_one"),
    ThresholdCase("threshold_each", "float32", 6, 777, 300, each=True),
    ThresholdCase("threshold_float16", "float16", 2, 6, 1),
]


def run_sparse_mlp_case(case: SparseMlpCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

    # Any strides.
    x = numbers(1, case.rows, case.width, 2)[..., 1]
    weights = numbers(case.neurons, case.width), numbers(case.neurons, case.width), numbers(case.width, case.neurons)
    packed = sparse_reference.by_neuron(*weights)
    neurons = None
    if case.lists:
        neurons = torch.stack([torch.randperm(case.neurons, generator=generator) for _ in range(case.lists)]).int()
        neurons = neurons[:, : case.listed].contiguous()
        neurons[:, 1] = -1
        unread = torch.ones(case.neurons, dtype=torch.bool)
        unread[neurons[neurons >= 0].long()] = False
        for weight in packed:
            weight[unread] = torch.nan
    spec = case.spec()
    expected = sparse_reference.sparse_mlp(spec, x, *packed, neurons)
    moved = [None if t is None else t.to(device) for t in (x, *packed, neurons)]
    got = sparse_mlp.sparse_mlp(spec)(*moved).cpu()
    if found := difference("y", got, expected, TOLERANCE[case.dtype]):
        return found
    if neurons is not None:
        neurons[-1, 0] = case.neurons
        got = sparse_mlp.sparse_mlp(spec)(*moved[:4], neurons.to(device)).cpu()[0]
        if not got[-1].isnan().all() or (case.lists > 1 and got[:-1].isnan().any()):
            return "a neuron that does not exist leaves its row a number, or takes that from another"
    return None


def run_threshold_case(case: ThresholdCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])

    x = numbers(1, case.rows, case.inputs, 2)[..., 1]
    weights, biases = [numbers(case.inputs, case.outputs) for _ in range(2)], [numbers(case.outputs), None]
    thresholds = [torch.full((1,), 0.8), torch.rand(case.inputs if case.each else 1, generator=generator)]
    for weight, threshold in zip(weights, thresholds, strict=True):
        weight[(x[0].float().abs() <= threshold).all(0)] = torch.nan
    expected = sparse_reference.threshold_linear(x, weights, biases, thresholds)
    moved = [[None if t is None else t.to(device) for t in tensors] for tensors in (weights, biases, thresholds)]
    got = threshold_linear.threshold_linear(case.spec())(x.to(device), *moved)
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if found := difference(f"result {number}", ours.cpu(), theirs, TOLERANCE[case.dtype]):
            return found
    return None
