"""C++ that appends tokens to the pages of a ragged cache."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from .compile import Entry, compile_source, render

FIELDS = ("k_pool, v_pool, tails, lens", "k_new, kn_b, kn_h, kn_n", "v_new, vn_b, vn_h, vn_n", "B, H, N, SIZE, C")


def source() -> str:
    """The C++ source; it has no free choices: tokens are copied byte by byte, whatever they are."""
    return render("append_pages.cpp.jinja", title="torchaccel append to pages", fields=FIELDS)


@lru_cache(maxsize=1)
def _kernel() -> Entry:
    return compile_source(source())


def append_pages(k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, tails: Tensor, lens: Tensor) -> None:
    """``ragged.append``, compiled."""
    batch, heads, n, dim = k_new.shape
    size = k_pool.element_size()
    args = [k_pool.data_ptr(), v_pool.data_ptr(), tails.data_ptr(), lens.data_ptr()]
    held = []
    for new, pool in ((k_new, k_pool), (v_new, v_pool)):
        fit = new if new.dtype == pool.dtype and new.stride(3) == 1 else new.to(pool.dtype).contiguous()
        held.append(fit)
        b, h, t, _ = fit.stride()
        args += (fit.data_ptr(), b * size, h * size, t * size)
    _kernel()(*args, batch, heads, n, dim * size, k_pool.shape[2])
