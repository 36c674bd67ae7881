"""LoopServe's progressive compression: the tokens generated last choose, again and again, what stays of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, LateEviction, Prompt, State, Step, best

from .evicting import EvictingMethod, EvictingOptions


class LoopServeOptions(EvictingOptions):
    """interval: generated tokens that vote, and calls between evictions. sinks: first tokens that stay."""

    default_budget: ClassVar[Budget] = Budget(tokens=1024)

    interval: int = Field(default=16, ge=1, le=512)
    sinks: int = Field(default=4, ge=0, le=4096)


@dataclass(frozen=True)
class LoopServePolicy(LateEviction):
    """Adds up the attention of the last ``interval`` calls; the budget is for the prompt, what is generated stays."""

    budget: Budget
    interval: int = 16
    sinks: int = 4
    step_mass: bool = True
    grows: bool = False

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        zeros = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
        return {"votes": zeros, "prompt": torch.ones_like(zeros), **self.marks(prompt, kept)}

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
    """Every ``interval`` tokens the prompt's cache is cut to what they attended to; what is gone does not return."""

    name = "loopserve"
    paper = "LoopServe: An Adaptive Dual-phase LLM Inference Acceleration System for Multi-Turn Dialogues (2025)"
    Options = LoopServeOptions

    def policy(self) -> LoopServePolicy:
        return LoopServePolicy(**self.settings("interval", "sinks"))
