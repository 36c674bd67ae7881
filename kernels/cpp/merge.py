"""Generated C++ for merging attention over several sets of keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..shared_prefix import Part
from ..spec import dtype_name
from .compile import Entry, compile_source, render
from .formats import C_TYPES


def source(dtype: str, dim: int, count: int) -> str:
    """The C++ source that merges ``count`` parts; equal arguments give equal text."""
    return render(
        "merge.cpp.jinja",
        title="torchaccel merge of partial attention",
        spec=f"{count} parts of {dtype}, head dim {dim}",
        fields=("out, B, H, Q", *(f"out{i}, lse{i}, share{i}" for i in range(count))),
        dtype=C_TYPES[dtype],
        dim=dim,
        count=count,
    )


@lru_cache(maxsize=64)
def _kernel(dtype: str, dim: int, count: int) -> Entry:
    return compile_source(source(dtype, dim, count))


def merge(parts: Sequence[Part], q: Tensor) -> Tensor:
    """``shared_prefix.merge``: parts contiguous, as kernels return them; the result contiguous, in the parts' dtype."""
    batch, heads, n, _ = q.shape
    first = parts[0].out
    out = torch.empty((batch, heads, n, first.shape[3]), dtype=first.dtype)
    args = [out.data_ptr(), batch, heads, n]
    for part in parts:
        if not (part.out.is_contiguous() and part.lse.is_contiguous()):
            raise ValueError("parts must be contiguous, as kernels return them")
        args += (part.out.data_ptr(), part.lse.data_ptr(), part.share)
    _kernel(dtype_name(first.dtype), first.shape[3], len(parts))(*args)
    return out
