"""Quest: bounds of the keys of every page tell which pages a query may need."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.summaries import SummarySelection

from ..retrieving import RetrievingMethod, RetrievingOptions

LEAST_PAGES = 3


class QuestOptions(RetrievingOptions):
    """tokens: that a step reads, in whole pages, three at least. page: tokens of a page. gqa_reduce: how the query
    heads of a KV head agree."""

    tokens: int = Field(default=1024, ge=1)
    page: Literal[16, 32, 64] = 16
    gqa_reduce: Literal["max", "mean"] = "max"


class Quest(RetrievingMethod):
    """Every step reads the pages of highest bound of q . k, and the newest one; the query heads of a KV head together.

    All tokens stay in the cache, and bounds of an eighth of the keys' bytes (pages of 16) with them.
    """

    name = "quest"
    family = "sparse_attention"
    paper = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (2024)"
    Options = QuestOptions

    options: QuestOptions

    def policy(self, site: AttentionSite) -> SummarySelection:
        pages = max(LEAST_PAGES, self.options.tokens // self.options.page)
        return SummarySelection("minmax", pages, self.options.page, 0, 1, self.options.gqa_reduce)
