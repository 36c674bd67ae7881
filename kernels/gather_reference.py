"""The truth about gathering tokens, in plain PyTorch on any device, and what kernels ask of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .gather_spec import GatherSpec, TokenItem


def gather_tokens(spec: GatherSpec, inputs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """The tokens ``index`` int64 ``[B, K]`` of every input, contiguous; all of them must exist."""
    results = []
    for item, x in zip(spec.items, inputs, strict=True):
        for dim in range(item.dim, item.dim + 1 + item.square):
            shape = [1] * x.dim()
            if dim:
                shape[0] = index.shape[0]
            shape[dim] = index.shape[1]
            x = torch.take_along_dim(x, index.view(shape), dim)
        results.append(x.contiguous())
    return results


def check(spec: GatherSpec, inputs: Sequence[Tensor], index: Tensor) -> int:
    """The number of tokens of every input; raises ``ValueError`` for tensors that are not what a spec says."""
    if index.dtype != torch.int64 or index.dim() != 2:
        raise ValueError(f"tokens are numbered by int64 [B, K]; found {index.dtype} {list(index.shape)}")
    batch = index.shape[0]
    found = set()
    for item, x in zip(spec.items, inputs, strict=True):
        dim = item.dim
        if x.element_size() != item.width or x.dim() < dim + 1 + item.square:
            raise ValueError(f"{item} does not describe a tensor {list(x.shape)} of {x.dtype}")
        if batch > 1 and (not dim or x.shape[0] not in (1, batch)):
            raise ValueError(
                f"tokens of {batch} rows are taken of tensors with 1 or {batch} rows; found {list(x.shape)}"
            )
        if item.square and (x.dim() != dim + 2 or x.shape[dim] != x.shape[dim + 1]):
            raise ValueError(f"dimensions {dim} and {dim + 1} must be the last and equal; found {list(x.shape)}")
        found.add(x.shape[dim])
    if len(found) != 1:
        raise ValueError(f"the same tokens are taken of tensors with as many tokens each; found {sorted(found)}")
    return found.pop()


def in_rows(
    item: TokenItem, x: Tensor, result: tuple[int, ...]
) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """``x``, copied where needed, as kernels read it for a result of a shape, and its strides and sizes.

    Strides, in elements: from one batch row to the next (0 where there is one for all), from one lead, such as a head,
    to the next, and from token to token. Sizes: batch rows of the result, leads of each, and elements that are taken of
    a token at a time.
    """
    dim = item.dim
    lead, inner = x.shape[1:dim], x.shape[dim + 1 :]
    side_by_side = tuple(prod(inner[i + 1 :]) for i in range(len(inner)))
    # Leads must be one dimension, and what is taken of a token a piece.
    if sum(size > 1 for size in lead) > 1 or x.stride()[dim + 1 :] != side_by_side:
        x = x.contiguous()
    strides = x.stride()
    batch = strides[0] if dim and x.shape[0] > 1 else 0
    apart = next((strides[d] for d in range(dim - 1, 0, -1) if x.shape[d] > 1), 0)
    size = 1 if item.square else prod(inner)
    return x, (batch, apart, strides[dim]), (result[0] if dim else 1, prod(lead), size)
