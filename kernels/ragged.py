"""Attention over a cache whose KV heads hold different numbers of tokens: each has pages of its own in one buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Tokens of a page. Half a page is lost for every row and head; smaller tiles than 32 keys cost time.
PAGE = 32


def append(k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, tails: Tensor, lens: Tensor) -> None:
    """Write new tokens behind what every head holds, in place; arguments as in ``attend``."""
    n = k_new.shape[2]
    free = tails + int(lens[3])
    if n > 1:
        free = free[..., None] + torch.arange(n, device=free.device)
    free = free.view(-1)
    for pool, new in ((k_pool, k_new), (v_pool, v_new)):
        slots = pool[0, 0]
        slots.index_copy_(0, free, new.reshape(-1, new.shape[3]).to(slots.dtype))


def attend(
    run: Callable[..., Tensor],
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    table: Tensor,
    tails: Tensor,
    head_windows: Tensor | None = None,
    store: Callable[..., None] = append,
) -> Tensor:
    """Append ``k_new``, ``v_new`` to every head's pages in place, then attend to what the heads hold.

    run: a decode kernel of a causal spec with positions and lists of blocks of ``PAGE`` slots. q: ``[B, H, Q, D]``.
    k_new, v_new: ``[B, H_kv, Q, D]``. k_pool, v_pool: ``[1, 1, C, D]``, finite everywhere. lens: int64 ``[4]`` on the
    CPU: 0, C, logical length before the append, tokens appended since ``tails`` were noted. mask: as in
    ``reference.decode_attention``. positions: int32 ``[1, 1, C]``, columns of all slots; those of slots to come are
    known, too, and hide them. table: int32 ``[B, H_kv, N]``, the pages of each row and head, -1 for none. tails: int64
    ``[B, H_kv]``, a row and head's first free slot. head_windows: int32 ``[H_kv]``. store: ``append``, or what does the
    same. Returns ``[B, H, Q, D]``.
    """
    batch, heads = k_new.shape[:2]
    store(k_pool, v_pool, k_new, v_new, tails, lens)
    keys, values = (pool.expand(batch, heads, -1, -1) for pool in (k_pool, v_pool))
    return run(q, None, None, keys, values, lens[:3], mask, positions.expand(batch, heads, -1), table, head_windows)
