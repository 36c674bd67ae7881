"""StreamingLLM: every query sees the first tokens (attention sinks) and a window of recent ones."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite

from ..base import SitePlan
from .sliding_window import SlidingWindow, SlidingWindowOptions


class StreamingLLMOptions(SlidingWindowOptions):
    """sinks: first real tokens of a row that stay visible, beside the window."""

    sinks: int = Field(default=4, ge=0, le=4096)


class StreamingLLM(SlidingWindow):
    """A sliding window beside attention sinks, in prefill, extend and decode."""

    name = "streaming_llm"
    aliases: ClassVar[tuple[str, ...]] = ("streaming",)
    paper = "Efficient Streaming Language Models with Attention Sinks (2023)"
    Options = StreamingLLMOptions

    options: StreamingLLMOptions

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        super().treat(plan, site)
        plan.sinks = self.options.sinks
