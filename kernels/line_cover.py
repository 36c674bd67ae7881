"""Columns and diagonals of blocks that cover a part of some rows' attention, in plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def line_cover(weights: Tensor, own: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Which columns and diagonals of blocks cover ``part`` of ``weights``: two bool ``[B, H, N]``.

    weights: float32 ``[B, H, R, N]``, what rows give to every block of keys. own: int64 ``[B, R]``, the block of each
    row; a diagonal d holds the weights of every row for the block d before its own. Diagonal 0 is always taken. Then,
    again and again, the line that adds most to what is covered, columns first and nearer ones first among equals.
    """
    batch, heads, _, blocks = weights.shape
    left = weights.clone()
    total = left.sum((2, 3))
    behind = own[:, :, None] - torch.arange(blocks, device=weights.device)  # [B, R, N], below 0: no block
    seen = (behind >= 0)[:, None]
    left = left.masked_fill(~seen, 0)
    line = behind.clamp(min=0)[:, None].expand(-1, heads, -1, -1)
    taken = torch.zeros(batch, heads, 2 * blocks, dtype=torch.bool, device=weights.device)
    # A weight is in one column and one diagonal: what takes either takes it from both.
    pick = torch.full((batch, heads, 1), blocks, device=weights.device)
    active = torch.ones_like(pick, dtype=torch.bool)
    for _ in range(2 * blocks):
        taken = taken | torch.zeros_like(taken).scatter_(2, pick, active)
        column = torch.arange(blocks, device=weights.device) == pick[..., None]
        covered = torch.where((pick < blocks)[..., None], column, (line == (pick - blocks)[..., None]) & seen)
        left = left.masked_fill(covered & active[..., None], 0)
        active = total[..., None] - left.sum((2, 3))[..., None] < part * total[..., None]
        if not active.any():
            break
        gains = torch.cat(
            [left.sum(2), torch.zeros_like(left[:, :, 0]).scatter_add_(2, line.flatten(2), left.flatten(2))], 2
        )
        pick = gains.masked_fill(taken, -1).argmax(2, keepdim=True)
    return taken[..., :blocks], taken[..., blocks:]
