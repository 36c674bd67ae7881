"""LoopServe's progressive compression: the tokens generated last choose, again and again, what stays of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchaccel.runtime.eviction import Budget, LateEviction, Prompt, State, Step, best, protect

from ..offloading import Offload, needs_restore
from .evicting import EvictingMethod, EvictingOptions


class LoopServeOptions(EvictingOptions):
    """interval: generated tokens that vote, and calls between evictions. sinks: first tokens that stay. restore: the
    prompt is set aside in host memory, and what does not stay may come back; without, what is gone is gone. offload: a
    folder; what is set aside lies in files there."""

    default_budget: ClassVar[Budget] = Budget(tokens=1024)

    interval: int = Field(default=16, ge=1, le=512)
    sinks: int = Field(default=4, ge=0, le=4096)
    restore: bool = False
    offload: Offload = None

    @model_validator(mode="after")
    def _set_aside(self) -> LoopServeOptions:
        return needs_restore(self)


@dataclass(frozen=True)
class LoopServePolicy(LateEviction):
    """Adds up the attention of the last ``interval`` calls; the budget is for the prompt, what is generated stays.

    With ``restore`` it is attention to the whole prompt, by the last ``interval`` queries: the mean over a KV head's.
    """

    budget: Budget
    interval: int = 16
    sinks: int = 4
    restore: bool = False
    grows: bool = False
    folder: str | None = None

    @property
    def step_mass(self) -> bool:  # type: ignore[override]
        return not self.restore

    @property
    def later_queries(self) -> int:  # type: ignore[override]
        return self.interval if self.restore else 0

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        if self.restore:
            return {}
        zeros = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
        return {"votes": zeros, "prompt": torch.ones_like(zeros), **self.marks(prompt, kept)}

    def due(self, step: Step) -> bool:
        return step.count % self.interval == 0

    def recall(self, prompt: Prompt, step: Step, capacity: int) -> Tensor:
        votes = prompt.grouped(prompt.later_attention().sum(2))
        votes = protect(votes, prompt.valid, self.sinks, 0).masked_fill(~prompt.valid[:, None], -torch.inf)
        return best(votes, capacity)

    def observe(self, state: State, step: Step) -> None:
        assert step.mass is not None
        state["votes"] += step.mass

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        if step.count % self.interval:
            return None
        votes, of_prompt = state["votes"].clone(), state["prompt"]
        state["votes"].zero_()
        # Equal for every row and head: whoever keeps as many tokens of the prompt has generated as many.
        generated = step.stored - int(of_prompt[0, 0].sum())
        if step.stored - generated <= capacity:
            return None
        votes = votes.masked_fill(state["padding"] > 0, -torch.inf)
        votes = votes.masked_fill((state["safe"] > 0) | (of_prompt == 0), torch.inf)
        return best(votes, capacity + generated)


class LoopServe(EvictingMethod):
    """Every ``interval`` tokens the prompt's cache is cut to what they attended to, for good or for a while."""

    name = "loopserve"
    paper = "LoopServe: An Adaptive Dual-phase LLM Inference Acceleration System for Multi-Turn Dialogues (2025)"
    Options = LoopServeOptions

    options: LoopServeOptions

    def policy(self) -> LoopServePolicy:
        return LoopServePolicy(folder=self.options.offload, **self.settings("interval", "sinks", "restore"))
