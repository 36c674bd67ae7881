"""Merging attention over disjoint sets of keys in Triton: one pass over the parts, whatever their number."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .source import load, render_text

# Parts of one launch; more are merged in rounds.
MOST = 16
ROWS = 4


@lru_cache(maxsize=512)
def generate(parts: int, head_dim: int) -> str:
    """Triton source of the kernel ``merge`` for so many parts."""
    return render_text("merge.py.jinja", head_dim, parts=parts)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint sets of keys, from that over each: (out, lse) of every one.

    out: ``[B, H, Q, D]`` normalised. lse: float32 ``[B, H, Q]``, minus infinity for an empty set.
    Returns the same for the union, ``out`` in the dtype of the first part's.
    """
    dtype = parts[0][0].dtype
    while len(parts) > MOST:
        # What is merged again stays float32.
        parts = [_merge(parts[i : i + MOST], torch.float32) for i in range(0, len(parts), MOST)]
    return _merge(parts, dtype)


def _merge(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first, first_lse = parts[0]
    out = torch.empty_like(first, dtype=dtype, memory_format=torch.contiguous_format)
    lse = torch.empty_like(first_lse, memory_format=torch.contiguous_format)
    rows = lse.numel()
    tensors: list[Any] = [x.contiguous() for part in parts for x in part]
    module = load(generate(len(parts), first.shape[-1]), "merge")
    with torch.cuda.device_of(first):
        module.merge[(-(-rows // ROWS),)](out, lse, rows, *tensors, BM=ROWS, num_warps=4)
    return out, lse
