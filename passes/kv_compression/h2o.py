"""H2O: tokens that received much attention so far (heavy hitters) stay, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, State, Step, best, newest_first, protect

from .evicting import EvictingMethod, EvictingOptions


class H2OOptions(EvictingOptions):
    """recent: share of the budget of the most recent tokens. interval: calls between evictions, 1 in the paper."""

    default_budget: ClassVar[Budget] = Budget(ratio=0.2)

    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    interval: int = Field(default=16, ge=1, le=512)


@dataclass(frozen=True)
class H2OPolicy(Eviction):
    """Scores are the attention a token received from every query so far, summed over the group's heads."""

    budget: Budget
    recent: float = 0.5
    interval: int = 16
    prompt_mass: bool = True
    step_mass: bool = True
    grows: bool = False

    def score(self, prompt: Prompt) -> Tensor:
        assert prompt.mass is not None
        return protect(prompt.mass, prompt.valid, 0, self._recent(self.capacity(prompt)))

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        assert prompt.mass is not None
        return {"received": prompt.mass.gather(2, kept)}

    def observe(self, state: State, step: Step) -> None:
        assert step.mass is not None
        state["received"] += step.mass

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        if step.stored < capacity + self.interval:
            return None
        return best(newest_first(state["received"], self._recent(capacity)), capacity)

    def _recent(self, capacity: int) -> int:
        return min(capacity, max(1, round(self.recent * capacity)))


class H2O(EvictingMethod):
    """Keeps heavy hitters and recent tokens, in prompt and decoding; the cache never outgrows budget and interval."""

    name = "h2o"
    paper = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (2023)"
    Options = H2OOptions

    def policy(self) -> H2OPolicy:
        return H2OPolicy(**self.settings("recent", "interval"))
