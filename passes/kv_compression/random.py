"""Random eviction: the floor that every method that looks at its tokens has to beat at the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, State, Step, best

from .evicting import EvictingMethod, EvictingOptions


class RandomOptions(EvictingOptions):
    """seed: of the choice. decoding: evict while decoding, too, every ``interval`` calls."""

    seed: int = Field(default=0, ge=0)
    decoding: bool = False
    interval: int = Field(default=16, ge=1, le=512)


@dataclass(frozen=True)
class RandomPolicy(Eviction):
    """Every token of a KV head draws a lot when it comes; the highest ones stay."""

    budget: Budget
    seed: int = 0
    interval: int = 16
    grows: bool = True

    def score(self, prompt: Prompt) -> Tensor:
        return self._lots(prompt.keys[..., 0], prompt.layer)

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        return {} if self.grows else {"lot": self.score(prompt).gather(2, kept)}

    def observe(self, state: State, step: Step) -> None:
        fresh = state["lot"][..., step.stored - step.fresh :]
        fresh.copy_(self._lots(fresh, step.count))

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        return None if step.stored < capacity + self.interval else best(state["lot"], capacity)

    def _lots(self, like: Tensor, turn: int) -> Tensor:
        # Drawn on the CPU: every device draws the same.
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + turn)
        return torch.rand(like.shape, generator=generator).to(like.device)


class Random(EvictingMethod):
    """Keeps tokens drawn by lot: what a budget costs when nothing is known of the tokens."""

    name = "random"
    paper = "none: a baseline"
    Options = RandomOptions

    options: RandomOptions

    def policy(self) -> RandomPolicy:
        return RandomPolicy(**self.settings("seed", "interval"), grows=not self.options.decoding)
