"""FlexPrefill: as many lines, or blocks, as hold a part of the attention of the prompt's last block."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torchaccel.kernels.prompt_selectors.adaptive import AdaptiveLines
from torchaccel.kernels.prompt_selectors.base import PromptSelector

from torchaccel.graph.anatomy import AttentionSite

from .prompt import MassOptions, PromptMethod


class FlexPrefillOptions(MassOptions):
    """gamma: part of the attention to hold. tau: distance below which a head is query-aware, 0 for no such heads.

    min_budget, max_budget: tokens' worth of columns, and of diagonals; block: tokens of a block.
    """

    gamma: float = Field(default=0.9, gt=0.0, le=1.0)
    tau: float = Field(default=0.1, ge=0.0, le=1.0)
    min_budget: int = Field(default=1024, ge=1)
    max_budget: int | None = Field(default=None, ge=1)
    block: Literal[64, 128] = 128


class FlexPrefill(PromptMethod):
    """Decides for every query head anew whether block columns and diagonals, or pairs of blocks, serve it."""

    name = "flex_prefill"
    aliases = ("flexprefill",)
    paper = "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (2025)"
    Options = FlexPrefillOptions

    options: FlexPrefillOptions

    def selector(self, site: AttentionSite) -> PromptSelector:
        asked = self.options
        return AdaptiveLines(
            asked.block, asked.gamma, asked.tau, asked.min_budget, asked.max_budget or 0, asked.density
        )
