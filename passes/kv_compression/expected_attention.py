"""Expected Attention: keys are worth the attention that future queries are expected to pay them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, protect

from .evicting import EvictingMethod, EvictingOptions


class ExpectedAttentionOptions(EvictingOptions):
    """future: positions behind the prompt over which the rotary embedding is averaged. sinks: first tokens that stay.
    covariance: whether the spread of queries counts, or their mean alone. recent: share of the budget for the most
    recent tokens, whatever they score. value_norm: whether tokens count for as much as their values are long. epsilon:
    attention that every token has at least, before that.

    The publication has no recent tokens (0) and counts values; that lost to random eviction (docs/kv_budgets.md).
    """

    default_budget: ClassVar[Budget] = Budget(ratio=0.5)

    future: int = Field(default=512, ge=1, le=65536)
    sinks: int = Field(default=4, ge=0, le=4096)
    covariance: bool = True
    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    value_norm: bool = False
    epsilon: float = Field(default=0.0, ge=0.0, le=1.0)


@dataclass(frozen=True)
class ExpectedAttentionPolicy(Eviction):
    """Future queries are taken to be normally distributed, as those of the prompt are before rotary embedding."""

    budget: Budget
    future: int = 512
    sinks: int = 4
    covariance: bool = True
    recent: float = 0.5
    value_norm: bool = False
    epsilon: float = 0.0
    unrotated: bool = True

    def score(self, prompt: Prompt) -> Tensor:
        assert prompt.plain_queries is not None
        late = (prompt.valid.int().cumsum(-1) > self.sinks) & prompt.valid
        mean, spread = statistics(prompt.plain_queries, late)
        turn = prompt.mean_rotation(self.future)
        if turn is not None:
            mean = (turn @ mean[..., None]).squeeze(-1)
            spread = turn @ spread @ turn.mT
        if not self.covariance:
            spread = torch.zeros_like(spread)
        expected = prompt.grouped(expectation(mean, spread, prompt.keys, prompt.scale, late)) + self.epsilon
        if self.value_norm:
            expected = expected * prompt.values.float().norm(dim=-1)
        return protect(expected, prompt.valid, self.sinks, round(self.recent * self.capacity(prompt)))


def statistics(queries: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, H, D]``, covariance ``[B, H, D, D]`` of queries ``[B, H, S, D]`` where ``counted`` bool ``[B, S]``."""
    weight = counted[:, None, :, None].float()
    count = weight.sum(2).clamp(min=1)
    x = queries.float() * weight
    mean = x.sum(2) / count
    x = (queries.float() - mean[:, :, None]) * weight
    return mean, x.mT @ x / count[..., None]


def expectation(mean: Tensor, spread: Tensor, keys: Tensor, scale: float, counted: Tensor) -> Tensor:
    """Share of the expected ``exp(q . k * scale)`` of each key among those that are ``counted`` bool ``[B, S]``.

    mean ``[B, H, D]``, spread ``[B, H, D, D]``, keys ``[B, H_kv, S, D]``; float32 ``[B, H, S]``. Of normal q the
    expectation is ``exp(mean . k * scale + k' spread k * scale**2 / 2)``.
    """
    group = mean.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(group, 1)
    logits = (k @ mean[..., None]).squeeze(-1) * scale + ((k @ spread) * k).sum(-1) * scale**2 / 2
    return torch.softmax(logits.masked_fill(~counted[:, None], -torch.inf), -1).nan_to_num(0.0)


class ExpectedAttention(EvictingMethod):
    """After the prompt each KV head keeps what queries to come are expected to attend to; then it grows."""

    name = "expected_attention"
    paper = "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution (2025)"
    Options = ExpectedAttentionOptions

    def policy(self) -> ExpectedAttentionPolicy:
        return ExpectedAttentionPolicy(
            **self.settings("future", "sinks", "covariance", "recent", "value_norm", "epsilon")
        )
