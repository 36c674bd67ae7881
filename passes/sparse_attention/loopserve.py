"""LoopServe's prefill: the fewest columns and diagonals that cover a part of what sampled rows attend to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torchaccel.kernels.prompt_selectors.base import PromptSelector
from torchaccel.kernels.prompt_selectors.covering import CoveringLines

from torchaccel.graph.anatomy import AttentionSite

from .prompt import MassOptions, PromptMethod


class LoopServePromptOptions(MassOptions):
    """alpha: part of the sampled rows' attention to cover. recent: rows at the prompt's end among them; sampled:
    earlier ones, at places that ``seed`` fixes. block: tokens of a block, to which lines are rounded up.
    """

    alpha: float = Field(default=0.955, gt=0.0, le=1.0)
    recent: int = Field(default=32, ge=1, le=1024)
    sampled: int = Field(default=32, ge=0, le=1024)
    seed: int = Field(default=0, ge=0)
    block: Literal[64, 128] = 64


class LoopServePrompt(PromptMethod):
    """Chooses lines for every query head; what it does while decoding is the ``kv_compression`` method of this name."""

    name = "loopserve"
    paper = "LoopServe: An Adaptive Dual-phase LLM Inference Acceleration System for Multi-Turn Dialogues (2025)"
    Options = LoopServePromptOptions

    options: LoopServePromptOptions

    def selector(self, site: AttentionSite) -> PromptSelector:
        asked = self.options
        return CoveringLines(asked.block, asked.alpha, asked.recent, asked.sampled, asked.seed, asked.density)
