"""Video-XL-2's prefill: chunks of the prompt see themselves, a few chunks before them, and the beginning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torchaccel.kernels.prompt_selectors.base import PromptSelector
from torchaccel.kernels.prompt_selectors.static import ChunkedBlocks

from torchaccel.graph.anatomy import AttentionSite

from ..layerwise import LayerwiseOptions
from .prompt import PromptMethod


class VideoXLPromptOptions(LayerwiseOptions):
    """chunk: tokens of a chunk, a multiple of ``block``. previous: chunks that it sees before itself. prefix: first
    tokens that all see. question: last tokens of the prompt, which see everything. block: tokens of a block, to which
    prefix and question are rounded up."""

    chunk: int = Field(default=512, ge=64)
    previous: int = Field(default=3, ge=0)
    prefix: int = Field(default=64, ge=0)
    question: int = Field(default=64, ge=0)
    block: Literal[64, 128] = 64

    @model_validator(mode="after")
    def _whole_blocks(self) -> VideoXLPromptOptions:
        if self.chunk % self.block:
            raise ValueError(f"chunk must be a multiple of block, {self.block}; found {self.chunk}")
        return self


class VideoXLPrompt(PromptMethod):
    """The chunked half of Video-XL-2; its cache for decoding is the ``kv_compression`` method of this name."""

    name = "video_xl"
    paper = "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification (2025)"
    Options = VideoXLPromptOptions

    options: VideoXLPromptOptions

    def selector(self, site: AttentionSite) -> PromptSelector:
        asked = self.options
        return ChunkedBlocks(asked.block, asked.chunk // asked.block, asked.previous, asked.prefix, asked.question)
