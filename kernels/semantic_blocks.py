"""Blocks of keys by what overlapping windows of them receive (InfLLM v2): plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def semantic_blocks(
    weights: Tensor, own: Tensor, begin: Tensor, ratio: int, width: int, sinks: int, local: int
) -> Tensor:
    """The ``width`` best blocks: int32 ``[B, H_kv, M, width]``, ascending, then -1.

    weights: float32 ``[B, H_kv, M, N]``, what every window of keys receives; a window is as long as two strides and
    starts one stride after the one before, and ``ratio`` strides make a block. A block has the greatest weight of the
    windows that touch it. own: int64 ``[M]``, the block of the asking tokens; begin: int64 ``[B]``, the first live
    block. The first ``sinks`` live blocks, the own one and the ``local`` before it are always chosen, and are part of
    the width. Later blocks are not. arXiv:2509.24663.
    """
    blocks = int(own.max()) + 1
    padded = torch.nn.functional.pad(weights, (0, blocks * ratio - weights.shape[-1]))
    scores = torch.nn.functional.max_pool1d(padded.flatten(0, 1), ratio + 1, ratio, 1).unflatten(0, weights.shape[:2])
    block = torch.arange(blocks, device=weights.device)
    begin, own = begin[:, None, None], own[:, None]
    forced = (block < begin + sinks) | (block >= own - local)
    live = (block >= begin) & (block <= own)  # [B, M, blocks]
    scores = scores.masked_fill(forced[:, None], torch.inf).masked_fill(~live[:, None], -torch.inf)
    best = scores.topk(min(width, blocks), -1)
    entries = best.indices.masked_fill(best.values == -torch.inf, blocks).sort(-1).values
    entries = torch.nn.functional.pad(entries, (0, width - entries.shape[-1]), value=blocks)
    return torch.where(entries == blocks, -1, entries).int()
