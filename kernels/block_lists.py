"""Lists of blocks from columns and diagonals of blocks, in plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def block_lists(columns: Tensor, diagonals: Tensor, pairs: Tensor | None, first: Tensor | None, block: int) -> Tensor:
    """The blocks of keys that every block of queries reads: int32 ``[B, H, N, N]``, ascending, then -1.

    columns: bool ``[B, H, N]``, blocks of keys that every later block of queries reads. diagonals: bool ``[B, H, N]``,
    by how many blocks a block of keys precedes the queries that read it. pairs: bool ``[B, H, N, N]``, further pairs of
    query block and key block, or None. first: int64 ``[B]``, first live token of every row, or None for zeros; block:
    tokens of a block. Every block of live queries reads itself; blocks before the first live one are not read.
    """
    count = columns.shape[2]
    n = torch.arange(count, device=columns.device)
    behind = n[:, None] - n
    wanted = columns[:, :, None] | diagonals[..., behind.clamp(min=0)] | (behind == 0)
    if pairs is not None:
        wanted = wanted | pairs
    wanted = wanted & (behind >= 0)
    if first is not None:
        live = n >= (first // block)[:, None]
        wanted = wanted & (live[:, :, None] & live[:, None])[:, None]
    entries = torch.where(wanted, n, count).sort(-1).values
    return torch.where(entries == count, -1, entries).int()
