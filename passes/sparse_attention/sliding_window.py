"""Sliding window: every query sees a window of recent tokens, and nothing before it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Fidelity, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache


class SlidingWindowOptions(LayerwiseOptions):
    """window: recent tokens that a query sees, its own included."""

    window: int = Field(default=1024, ge=1)


class SlidingWindow(LayerwiseMethod):
    """Restricts causal attention to the window in prefill, extend and decode; positions stay absolute.

    Only keys of the window are read: time and traffic stop growing with the context. The cache keeps every token, so
    the method can be changed between calls.
    """

    name = "sliding_window"
    family = "sparse_attention"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "Longformer: The Long-Document Transformer (2020)"
    Options: ClassVar[type[SlidingWindowOptions]] = SlidingWindowOptions

    options: SlidingWindowOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        return refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.window, plan.sinks, plan.bound = self.options.window, 0, None
