"""TOVA: after every step the tokens stay that the newest query attends to most, the same ones for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, State, Step, best

from .evicting import EvictingMethod, EvictingOptions


class TovaOptions(EvictingOptions):
    """interval: calls between evictions, 1 in the paper."""

    default_budget: ClassVar[Budget] = Budget(ratio=0.25)

    interval: int = Field(default=16, ge=1, le=512)


@dataclass(frozen=True)
class TovaPolicy(Eviction):
    """Scores are the attention of the last query, mean over all heads; tokens appended since the last one count too."""

    budget: Budget
    interval: int = 16
    last_queries: int = 1
    step_mass: bool = True
    grows: bool = False

    def score(self, prompt: Prompt) -> Tensor:
        mean = prompt.window_attention()[:, :, -1].mean(1, keepdim=True)
        return mean.expand(-1, prompt.keys.shape[1], -1)

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        if step.stored < capacity + self.interval:
            return None
        assert step.mass is not None
        return best(step.mass.mean(1, keepdim=True).expand_as(step.mass), capacity)


class Tova(EvictingMethod):
    """Drops what the newest query attends to least, in prompt and decoding; no token is safe, not even the first."""

    name = "tova"
    paper = "Transformers are Multi-State RNNs (2024)"
    Options = TovaOptions

    def policy(self) -> TovaPolicy:
        return TovaPolicy(**self.settings("interval"))
