"""Recycled Attention: most steps read what the last full step attended to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.recycling import RecycledSelection

from ..retrieving import RetrievingMethod, RetrievingOptions


class RecycledAttentionOptions(RetrievingOptions):
    """tokens: that most steps read. schedule: "fixed", a full step every ``stride``; "similarity", one also when, every
    ``check`` steps, the queries are less like the last full step's than ``similarity``, a cosine."""

    dense_layers: int = Field(default=0, ge=0)
    tokens: int = Field(default=4096, ge=1)
    stride: int = Field(default=50, ge=1)
    schedule: Literal["fixed", "similarity"] = "fixed"
    check: int = Field(default=5, ge=1)
    similarity: float = Field(default=0.8, ge=-1.0, le=1.0)

    @model_validator(mode="after")
    def _of_the_schedule(self) -> RecycledAttentionOptions:
        unused = sorted({"check", "similarity"} & self.model_fields_set)
        if self.schedule == "fixed" and unused:
            raise ValueError(f"the schedule 'fixed' has no {' and no '.join(unused)}; ask for 'similarity'")
        return self


class RecycledAttention(RetrievingMethod):
    """A full step lists what it attended to most; the steps up to the next one read that, and what is generated."""

    name = "recycled_attention"
    family = "sparse_attention"
    paper = "Recycled Attention: Efficient inference for long-context language models (2024)"
    Options = RecycledAttentionOptions

    options: RecycledAttentionOptions

    def policy(self, site: AttentionSite) -> RecycledSelection:
        chosen = self.options
        check = chosen.check if chosen.schedule == "similarity" else 0
        return RecycledSelection(
            chosen.tokens, chosen.stride, site.heads // site.kv_heads, check, chosen.similarity if check else 0.0
        )
