"""StreamingLLM as a cache: the first tokens (attention sinks) and the most recent ones, nothing else is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, State, Step, best, newest_first, protect

from .evicting import EvictingMethod, EvictingOptions


class StreamingLLMCacheOptions(EvictingOptions):
    """sinks: first real tokens of a row that stay; the rest of the budget is for the most recent ones. interval: calls
    between evictions, 1 in the paper."""

    default_budget: ClassVar[Budget] = Budget(tokens=2004)

    sinks: int = Field(default=4, ge=0, le=4096)
    interval: int = Field(default=16, ge=1, le=512)


@dataclass(frozen=True)
class StreamingLLMPolicy(Eviction):
    """Remembers which tokens are sinks: behind left padding they are not the first ones."""

    budget: Budget
    sinks: int = 4
    interval: int = 16
    grows: bool = False

    def score(self, prompt: Prompt) -> Tensor:
        # Places as scores: later tokens win, once the sinks are safe.
        place = torch.arange(prompt.keys.shape[2], device=prompt.keys.device, dtype=torch.float32)
        return protect(place.expand(*prompt.keys.shape[:2], -1), prompt.valid, self.sinks, 0)

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        early = (prompt.valid.int().cumsum(-1) <= self.sinks) & prompt.valid
        return {"sink": early[:, None].expand(-1, kept.shape[1], -1).gather(2, kept).float()}

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        if step.stored < capacity + self.interval:
            return None
        sinks = min(self.sinks, capacity)
        return best(newest_first(state["sink"], max(0, capacity - sinks)), capacity)


class StreamingLLMCache(EvictingMethod):
    """Keeps sinks and recent tokens at their own positions; the cache never outgrows budget and interval."""

    name = "streaming_llm"
    aliases = ("sinks",)
    paper = "Efficient Streaming Language Models with Attention Sinks (2023)"
    Options = StreamingLLMCacheOptions

    def policy(self) -> StreamingLLMPolicy:
        return StreamingLLMPolicy(**self.settings("sinks", "interval"))
