"""SnapKV: the last queries of the prompt vote for the tokens that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, protect

from .evicting import EvictingMethod, EvictingOptions


class SnapKVOptions(EvictingOptions):
    """window: last queries that vote, and tokens that always stay. kernel: width of the smoothing of votes; pooling:
    how they are smoothed. gqa_reduce: how the query heads of a KV head agree."""

    default_budget: ClassVar[Budget] = Budget(tokens=2048)

    window: int = Field(default=32, ge=1, le=512)
    kernel: int = Field(default=5, ge=1, le=63)
    pooling: Literal["avg", "max"] = "avg"
    gqa_reduce: Literal["mean", "sum", "max"] = "mean"


@dataclass(frozen=True)
class SnapKVPolicy(Eviction):
    """Votes are attention weights of the last ``window`` queries, summed, then pooled along the sequence."""

    budget: Budget
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    gqa_reduce: str = "mean"

    @property
    def last_queries(self) -> int:  # type: ignore[override]
        return self.window

    def score(self, prompt: Prompt) -> Tensor:
        window = prompt.queries.shape[2]
        votes = prompt.grouped(prompt.window_attention().sum(2), self.gqa_reduce)
        # Only the votes of tokens before the window are pooled: the window stays anyway.
        old = pooled(votes[..., : votes.shape[-1] - window], self.kernel, self.pooling)
        return protect(F.pad(old, (0, window)), prompt.valid, 0, min(window, self.capacity(prompt)))


def pooled(votes: Tensor, kernel: int, pooling: str) -> Tensor:
    """Votes ``[B, H, n]`` smoothed along the sequence, same length; averages count places beyond the edges as zeros."""
    if votes.shape[-1] == 0:
        return votes
    if pooling == "max":
        return F.max_pool1d(votes, kernel, 1, kernel // 2)[..., : votes.shape[-1]]
    return F.avg_pool1d(votes, kernel, 1, kernel // 2)[..., : votes.shape[-1]]


class SnapKV(EvictingMethod):
    """After the prompt each KV head keeps what its last queries attend to, and the last tokens; then it grows."""

    name = "snapkv"
    paper = "SnapKV: LLM Knows What You are Looking for Before Generation (2024)"
    Options = SnapKVOptions

    def policy(self) -> SnapKVPolicy:
        return SnapKVPolicy(**self.settings("window", "kernel", "pooling", "gqa_reduce"))
