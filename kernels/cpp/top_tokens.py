"""C++ that finds the tokens that received most attention."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .compile import Entry, compile_source, render

FIELDS = ("mass, out", "HEADS, C, N, K")


def source() -> str:
    """The C++ source; it has no free choices."""
    return render("top_tokens.cpp.jinja", title="torchaccel tokens of most attention", fields=FIELDS)


@lru_cache(maxsize=1)
def _kernel() -> Entry:
    return compile_source(source())


def top_tokens(mass: Tensor, tokens: int, count: int) -> Tensor:
    """``kernels.top_tokens.top_tokens``, compiled; of equal tokens the first ones."""
    batch, heads, slots = mass.shape
    mass = mass.contiguous()
    out = torch.empty((batch, heads, count), dtype=torch.int32)
    _kernel()(mass.data_ptr(), out.data_ptr(), batch * heads, slots, tokens, count)
    return out
