"""InfLLM v2: blocks of keys by overlapping windows, chosen by the query heads of a KV head together."""

from __future__ import annotations

from pydantic import Field, model_validator
from torchaccel.kernels.prompt_selectors.semantic import SemanticBlocks

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.semantic import SemanticSelection

from ..base import SitePlan
from ..retrieving import RetrievingMethod, RetrievingOptions

BLOCK, STRIDE = 64, 16


class InfLLMv2Options(RetrievingOptions):
    """blocks: of 64 tokens that are read besides the window, init_blocks first ones included. window: recent tokens.
    dense_len: tokens up to which everything is read."""

    blocks: int = Field(default=64, ge=2)
    window: int = Field(default=2048, ge=0, multiple_of=BLOCK)
    init_blocks: int = Field(default=1, ge=0)
    dense_len: int = Field(default=8192, ge=0)
    dense_layers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _room(self) -> InfLLMv2Options:
        if self.blocks <= self.init_blocks:
            raise ValueError(
                f"blocks={self.blocks} have no room for init_blocks={self.init_blocks} and the query's own: give more"
            )
        return self


class InfLLMv2(RetrievingMethod):
    """Prompts and steps alike read the blocks whose windows of keys they attend to most, the first and the recent ones.

    Models that were trained with it lose least; it needs no parameters. All tokens stay in the cache, and with them the
    mean of every 16 keys.
    """

    name = "infllm_v2"
    family = "sparse_attention"
    aliases = ("infllmv2",)
    paper = "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation (2025)"
    Options = InfLLMv2Options
    sparse_prompts = True

    options: InfLLMv2Options

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        if self.phase != "prefill":
            super().treat(plan, site)
        if site.key_cache.past is None and self.phase != "decode":
            asked = self.options
            plan.selector = SemanticBlocks(
                BLOCK, self._entries, self._local, asked.init_blocks, STRIDE, asked.dense_len
            )

    def policy(self, site: AttentionSite) -> SemanticSelection:
        asked = self.options
        return SemanticSelection(self._entries, self._local, asked.init_blocks, BLOCK, STRIDE, asked.dense_len)

    @property
    def _local(self) -> int:
        return self.options.window // BLOCK

    @property
    def _entries(self) -> int:
        return self.options.blocks + self._local
