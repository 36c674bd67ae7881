"""The tokens that received most attention, in plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(mass: Tensor, tokens: int, count: int) -> Tensor:
    """The ``count`` slots of highest mass among the first ``tokens``: int32 ``[B, H_kv, count]``, ascending, then -1.

    mass: float32 ``[B, H_kv, C]``, none below zero; NaN is above everything, so that it is read and shows.
    """
    taken = min(tokens, count)
    best = mass[..., :tokens].topk(taken, sorted=False).indices.sort(-1).values
    return torch.nn.functional.pad(best, (0, count - taken), value=-1).int()
