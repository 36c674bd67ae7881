"""Caches whose tokens are sorted into classes, each stored in a format of its own (ZipCache, arXiv 2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchaccel.kernels.spec import KVFormat

from .eviction import Prompt

# Channels below this size are taken for it: those that are zero would divide by zero.
LEAST_SCALE = 1e-4


@dataclass(frozen=True)
class Mixing:
    """How tokens are sorted and stored; subclasses are frozen dataclasses, they guard compiled graphs, and ``score``.

    high, low: formats of the keys and values of tokens that matter, and of the others. ratio: share of the others.
    interval: newest tokens that wait in full precision; when there are so many they are sorted, too. Values are divided
    by a scale for each channel before they are stored in any way, and attention's result is multiplied by it.
    """

    high: tuple[KVFormat, KVFormat]
    low: tuple[KVFormat, KVFormat]
    ratio: float
    interval: int

    # As of ``eviction.Eviction``: all queries of a prompt are wanted, as they are multiplied with keys.
    last_queries = 1 << 30
    unrotated = token_ids = images = False

    @property
    def formats(self) -> tuple[tuple[KVFormat, KVFormat], ...]:
        """Of keys and values, for each class."""
        return self.high, self.low

    def score(self, prompt: Prompt) -> Tensor:
        """How much each token matters, float32 ``[B, H_kv, S]``; padding may get anything."""
        raise NotImplementedError

    def sort(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The tokens of each class, int64 ``[B, H_kv, n]``, ascending; padding goes to the low one, if it has room."""
        scores = self.score(prompt).masked_fill(~prompt.valid[:, None], -torch.inf)
        order, low = scores.sort(dim=-1, stable=True).indices, int(self.ratio * scores.shape[-1])
        return order[..., low:].sort(-1).values, order[..., :low].sort(-1).values


def channel_scale(values: Tensor, valid: Tensor) -> Tensor:
    """What values ``[B, H, S, D]`` are divided by: the root of each channel's largest size, ``[B, H, 1, D]``."""
    size = values.float().abs().masked_fill(~valid[:, None, :, None], 0.0).amax(2, keepdim=True)
    return size.sqrt().clamp(min=LEAST_SCALE).to(values.dtype)


def without_padding(tokens: Tensor, valid: Tensor) -> Tensor:
    """Tokens ``[B, H, S, D]`` with the last one in place of padding, which must not widen what is quantised with it."""
    return torch.where(valid[:, None, :, None], tokens, tokens[:, :, -1:])


def taken(tokens: Tensor, members: Tensor) -> Tensor:
    """Tokens ``[B, H, n, D]`` that ``members`` int64 ``[B, H, n]`` names."""
    return tokens.gather(2, members[..., None].expand(-1, -1, -1, tokens.shape[3]))
