"""CRITIC: tokens are worth what attention they receive, and how widely they themselves attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import EVERY_QUERY, Budget, Eviction, Prompt, State, Step, best, newest_first, protect

from .evicting import EvictingMethod, EvictingOptions

# Queries whose attention is held at once: the S x S matrix never is.
CHUNK = 128
EPSILON = 1e-9


class CriticOptions(EvictingOptions):
    """entropy: weight of a token's own entropy against the attention it receives. recent: share of the budget for the
    most recent tokens, whatever they score. interval: calls between evictions."""

    default_budget: ClassVar[Budget] = Budget(ratio=0.5)

    entropy: float = Field(default=0.5, ge=0.0, le=1.0)
    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    interval: int = Field(default=64, ge=1, le=512)


@dataclass(frozen=True)
class CriticPolicy(Eviction):
    """Both terms are of the attention's mean over all heads, scaled to 0..1, one score for all heads of a layer.

    The paper's third term, gradients, has no published weight and needs a backward pass; its first one, the sum of a
    softmax row, is constant as printed and is read as the sum of a column. Entropies are over the logarithm of the
    number of visible tokens, or late tokens would win for being late.
    """

    budget: Budget
    entropy: float = 0.5
    recent: float = 0.5
    interval: int = 64
    last_queries: int = EVERY_QUERY
    step_mass: bool = True
    grows: bool = False

    def score(self, prompt: Prompt) -> Tensor:
        received, spread = self._prompt(prompt)
        scores = self._blend(received, spread, prompt.valid)[:, None].expand(-1, prompt.keys.shape[1], -1)
        return protect(scores, prompt.valid, 0, self._recent(self.capacity(prompt)))

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        received, spread = self._prompt(prompt)
        parts = {"received": received, "spread": spread, "valid": prompt.valid.float()}
        return {name: x[:, None].expand(-1, kept.shape[1], -1).gather(2, kept) for name, x in parts.items()}

    def observe(self, state: State, step: Step) -> None:
        assert step.mass is not None
        mean = step.mass.mean(1, keepdim=True) / step.group
        state["received"] += mean
        # Of several new tokens only the mean of their rows is known.
        new = slice(step.stored - step.fresh, None)
        state["valid"][..., new] = 1.0
        state["spread"][..., new] = entropy(mean / step.fresh, state["valid"].sum(-1, keepdim=True))[..., None]

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        if step.stored < capacity + self.interval:
            return None
        valid = state["valid"][:, 0] > 0
        scores = self._blend(state["received"][:, 0], state["spread"][:, 0], valid)
        scores = scores.masked_fill(~valid, -torch.inf)[:, None].expand_as(state["received"])
        return best(newest_first(scores, self._recent(capacity)), capacity)

    def _recent(self, capacity: int) -> int:
        return round(self.recent * capacity)

    def _prompt(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Attention received and entropy of each token of the prompt, float32 ``[B, S]``."""
        received = torch.zeros(prompt.valid.shape, device=prompt.keys.device)
        visible = prompt.valid.int().cumsum(-1)
        spread = []
        for first in range(0, prompt.queries.shape[2], CHUNK):
            rows = prompt.window_attention(first, first + CHUNK).mean(1)
            received += rows.sum(1)
            spread.append(entropy(rows, visible[:, first : first + CHUNK, None]))
        return received, torch.cat(spread, 1)

    def _blend(self, received: Tensor, spread: Tensor, valid: Tensor) -> Tensor:
        return (1 - self.entropy) * scaled(received, valid) + self.entropy * scaled(spread, valid)


def entropy(rows: Tensor, visible: Tensor) -> Tensor:
    """Entropy of attention rows ``[..., n]`` over that of attending evenly to ``visible`` tokens ``[..., 1]``."""
    bits = -(rows * (rows + EPSILON).log()).sum(-1)
    return bits / visible.squeeze(-1).float().clamp(min=2).log()


def scaled(x: Tensor, valid: Tensor) -> Tensor:
    """Rows ``[B, n]`` moved to 0..1 by the smallest and largest of their valid entries."""
    low = x.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    return (x - low) / (high - low + EPSILON)


class Critic(EvictingMethod):
    """Keeps the tokens whose blend of attention received and own entropy is highest, in prompt and decoding."""

    name = "critic"
    paper = "Scaling Test-Time Inference with Policy-Optimized, Dynamic Retrieval-Augmented Generation (CRITIC, 2025)"
    Options = CriticOptions

    def policy(self) -> CriticPolicy:
        return CriticPolicy(**self.settings("entropy", "recent", "interval"))
