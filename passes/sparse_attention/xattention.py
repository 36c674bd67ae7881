"""XAttention: the fewest blocks that hold a part of the attention, estimated by sums over antidiagonals."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torchaccel.kernels.prompt_selectors.base import PromptSelector
from torchaccel.kernels.prompt_selectors.estimated import EstimatedBlocks

from torchaccel.graph.anatomy import AttentionSite

from .prompt import MassOptions, PromptMethod


class XAttentionOptions(MassOptions):
    """threshold: part of the estimated attention that the chosen blocks of a row hold. stride: of the antidiagonals.

    block: tokens of a block.
    """

    threshold: float = Field(default=0.9, gt=0.0, le=1.0)
    stride: Literal[4, 8, 16] = 16
    block: Literal[64, 128] = 128


class XAttention(PromptMethod):
    """Chooses for every query head; the first and the own block of a row are always read."""

    name = "xattention"
    paper = "XAttention: Block Sparse Attention with Antidiagonal Scoring (2025)"
    Options = XAttentionOptions

    options: XAttentionOptions

    def selector(self, site: AttentionSite) -> PromptSelector:
        asked = self.options
        return EstimatedBlocks(asked.block, "antidiagonal", asked.stride, mass=asked.threshold, expected=asked.density)
