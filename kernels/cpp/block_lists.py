"""C++ that makes lists of blocks from columns and diagonals of blocks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .compile import Entry, compile_source, render

FIELDS = ("columns, diagonals, pairs, first, out", "B, H, N, BLOCK")


def source() -> str:
    """The C++ source; it has no free choices."""
    return render("block_lists.cpp.jinja", title="torchaccel lists of blocks", fields=FIELDS)


@lru_cache(maxsize=1)
def _kernel() -> Entry:
    return compile_source(source())


def block_lists(columns: Tensor, diagonals: Tensor, pairs: Tensor | None, first: Tensor | None, block: int) -> Tensor:
    """``kernels.block_lists.block_lists``, compiled."""
    batch, heads, count = columns.shape
    out = torch.empty((batch, heads, count, count), dtype=torch.int32)
    columns, diagonals = columns.contiguous(), diagonals.contiguous()
    pairs = None if pairs is None else pairs.contiguous()
    first = None if first is None else first.to(torch.int64).contiguous()
    _kernel()(
        columns.data_ptr(), diagonals.data_ptr(), *(0 if x is None else x.data_ptr() for x in (pairs, first)),
        out.data_ptr(), batch, heads, count, block,
    )  # fmt: skip
    return out
