"""LongGen: a middle part of the layers reads everything, the others what follows from positions alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torchaccel.kernels.prompt_selectors.static import StridedBlocks

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.strided import StridedSelection

from ..base import Phase, SitePlan
from .streaming_llm import StreamingLLM, StreamingLLMOptions


class LongGenOptions(StreamingLLMOptions):
    """full: share of the layers, in the middle, that read everything, unless ``layers`` names the ones to treat.

    pattern: what the others read: sinks and a window, or besides them every ``stride``-th block of ``block`` tokens,
    sinks and window rounded up to blocks.
    """

    full: float = Field(default=1 / 3, ge=0.0, le=1.0)
    pattern: Literal["window", "strided"] = "window"
    sinks: int = Field(default=64, ge=0, le=4096)
    block: Literal[64, 128] = 64
    stride: int = Field(default=16, ge=2, le=1024)

    @model_validator(mode="after")
    def _of_the_pattern(self) -> LongGenOptions:
        unused = sorted({"block", "stride"} & self.model_fields_set)
        if self.pattern == "window" and unused:
            raise ValueError(f"the pattern 'window' has no {' and no '.join(unused)}; ask for 'strided'")
        return self

    def select(self, count: int) -> set[int]:
        chosen = super().select(count)
        if self.layers is not None:
            return chosen
        middle = round(count * self.full)
        begin = (count - middle) // 2
        return chosen - set(range(begin, begin + middle))


class LongGen(StreamingLLM):
    """For models that were trained so; the cache keeps every token, so it can be compared with any other pattern."""

    name = "longgen"
    aliases = ()
    paper = "A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts (2024)"
    Options = LongGenOptions

    options: LongGenOptions

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        asked = self.options
        if asked.pattern == "window":
            super().treat(plan, site)
            return
        sinks, local = (-(-tokens // asked.block) for tokens in (asked.sinks, asked.window))
        if self.phase != "decode":
            plan.selector = StridedBlocks(asked.block, sinks, local, asked.stride)
        if self.phase != "prefill":
            plan.selection = StridedSelection(asked.block, sinks, local, asked.stride)

    def keep_to(self, phase: str, graphs: frozenset[Phase]) -> None:
        if phase == "decode" and self.options.pattern == "strided":
            self.phase = phase  # what prompts store says how steps read it
        else:
            super().keep_to(phase, graphs)
