"""C++ that finds columns and diagonals of blocks that cover a part of some rows' attention."""

from __future__ import annotations

from ctypes import addressof, c_double
from functools import lru_cache

import torch
from torch import Tensor

from .compile import Entry, compile_source, render

FIELDS = ("weights, own, part, out", "UNITS, H, R, N")


def source() -> str:
    """The C++ source; it has no free choices."""
    return render("line_cover.cpp.jinja", title="torchaccel lines that cover attention", fields=FIELDS)


@lru_cache(maxsize=1)
def _kernel() -> Entry:
    return compile_source(source())


def line_cover(weights: Tensor, own: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """``kernels.line_cover.line_cover``, compiled."""
    batch, heads, rows, blocks = weights.shape
    left = weights.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    own, goal = own.contiguous(), c_double(part)
    out = torch.empty((batch, heads, 2, blocks), dtype=torch.bool)
    _kernel()(
        left.data_ptr(), own.data_ptr(), addressof(goal), out.data_ptr(), batch * heads, heads, rows, blocks
    )  # fmt: skip
    return out[:, :, 0], out[:, :, 1]
