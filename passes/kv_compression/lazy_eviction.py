"""LazyEviction: tokens that go quiet may come back; evict only those silent for longer than they ever were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, LateEviction, Prompt, State, Step, best, newest_first

from .evicting import EvictingMethod, EvictingOptions


class LazyEvictionOptions(EvictingOptions):
    """window: most recent tokens that stay, and calls between evictions. threshold: attention weight from which a token
    counts as active. sinks: first tokens of the prompt that stay. variant: the importance of the paper, or of its code.
    """

    default_budget: ClassVar[Budget] = Budget(tokens=1024)

    window: int = Field(default=64, ge=1, le=4096)
    threshold: float = Field(default=1e-4, gt=0.0, lt=1.0)
    sinks: int = Field(default=4, ge=0, le=4096)
    variant: Literal["paper", "code"] = "paper"


@dataclass(frozen=True)
class LazyEvictionPolicy(LateEviction):
    """Remembers of each token when it was last active, and the longest silence it came back from."""

    budget: Budget
    window: int = 64
    threshold: float = 1e-4
    sinks: int = 4
    variant: str = "paper"
    step_mass: bool = True
    grows: bool = False

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        zeros = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
        return {"last": zeros, "recurrence": zeros.clone(), **self.marks(prompt, kept)}

    def observe(self, state: State, step: Step) -> None:
        assert step.mass is not None
        state["last"][..., step.stored - step.fresh :] = step.count - 1
        # A KV head is active when its heads are on average: the kernel adds them up.
        active = step.mass >= self.threshold * step.group * step.fresh
        silence = step.count - state["last"]
        state["recurrence"].copy_(torch.where(active, torch.maximum(state["recurrence"], silence), state["recurrence"]))
        state["last"].masked_fill_(active, step.count)

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        if step.stored <= capacity or step.count % self.window:
            return None
        scores = importance(step.count, state["last"], state["recurrence"], self.variant)
        scores = scores.masked_fill(state["padding"] > 0, -torch.inf).masked_fill(state["safe"] > 0, torch.inf)
        return best(newest_first(scores, min(self.window, capacity)), capacity)


def importance(step: int, last: Tensor, recurrence: Tensor, variant: str) -> Tensor:
    """H1 + H2: how overdue a token is against its own longest silence, and how short that silence is."""
    silence = step - last
    if variant == "code":
        return 2 / (1 + torch.exp(1 + silence / (recurrence + 1e-5))) + 2 / (1 + torch.exp(recurrence - 1))
    overdue = torch.where(silence > 0, silence / recurrence, torch.zeros_like(silence))
    frequent = torch.where(recurrence > 0, 2 * torch.sigmoid(1 - recurrence), torch.zeros_like(recurrence))
    return 2 * torch.sigmoid(-overdue) + frequent


class LazyEviction(EvictingMethod):
    """Keeps the whole prompt at first; from then on every ``window`` calls the cache is cut to its budget."""

    name = "lazy_eviction"
    paper = "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning (2025)"
    Options = LazyEvictionOptions

    def policy(self) -> LazyEvictionPolicy:
        return LazyEvictionPolicy(**self.settings("window", "threshold", "sinks", "variant"))
