"""The truth about fused kernels: a spec's program in plain PyTorch, float32 inside, any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused_spec import (
    Activation,
    Add,
    Concat,
    FusedSpec,
    Gather,
    Linear,
    Multiply,
    Norm,
    Rope,
    Scale,
    Slice,
    Step,
)
from .spec import DTYPES

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def fused(spec: FusedSpec, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run the program of ``spec`` on its inputs: one tensor of the spec's dtype per output, in the output's shape."""
    values: list[Tensor] = []
    for item, tensor in zip(spec.inputs, inputs, strict=True):
        shaped = tensor.reshape(item.shape)
        values.append(shaped if item.kind == "index" else shaped.float())
    for step in spec.steps:
        values.append(_run(step, values, DTYPES[spec.dtype]))
    return [values[out.value].to(DTYPES[spec.dtype]).reshape(out.shape).contiguous() for out in spec.outputs]


def _run(step: Step, values: list[Tensor], dtype: torch.dtype) -> Tensor:
    if isinstance(step, Concat):
        rows = values[step.parts[0]].shape[0]
        return torch.cat([values[p].view(rows, step.groups, -1) for p in step.parts], -1).flatten(1)
    x = values[step.x]
    if isinstance(step, Norm):
        return _norm(step, x, values)
    if isinstance(step, Linear):
        x = x.to(dtype).float()
        if step.threshold is not None:
            x = torch.where(x.abs() <= step.threshold, 0.0, x)
        weight = values[step.weight]
        y = x @ (weight if step.by_columns else weight.T)
        return y if step.bias is None else y + values[step.bias]
    if isinstance(step, Activation):
        return FUNCTIONS[step.function](x)
    if isinstance(step, Multiply):
        return x * values[step.y]
    if isinstance(step, Add):
        return x + values[step.y]
    if isinstance(step, Scale):
        return x * step.factor
    if isinstance(step, Slice):
        return x.view(x.shape[0], -1, step.group)[:, :, step.start : step.start + step.size].flatten(1)
    if isinstance(step, Gather):
        return x[values[step.index]]
    assert isinstance(step, Rope)
    cos, sin = values[step.cos][:, None], values[step.sin][:, None]
    heads = x.view(x.shape[0], -1, cos.shape[-1])
    first, second = heads.chunk(2, -1)
    return (heads * cos + torch.cat([-second, first], -1) * sin).flatten(1)


def _norm(step: Norm, x: Tensor, values: list[Tensor]) -> Tensor:
    groups = x.view(x.shape[0], -1, step.group)
    if step.kind == "layer":
        groups = groups - groups.mean(-1, keepdim=True)
    y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + step.eps)
    if step.weight is not None:
        y = y * (values[step.weight] + step.offset)
    if step.bias is not None:
        y = y + values[step.bias]
    return y.flatten(1)
