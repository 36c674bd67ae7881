"""DuoAttention: some KV heads see everything, the others attention sinks and a window, all with every token stored."""

from __future__ import annotations

from torchaccel.graph.anatomy import AttentionSite

from ..base import SitePlan
from ..gated_heads import GatedHeadsMethod, GatedHeadsOptions


class DuoAttentionReadingOptions(GatedHeadsOptions):
    """sinks, recent: first and last tokens that streaming heads read."""


class DuoAttentionReading(GatedHeadsMethod):
    """Streaming heads see sinks and window in the prompt, too; the ``kv_compression`` method drops what they do not.

    A plan that was made for one of the two serves the other.
    """

    family = "sparse_attention"
    Options = DuoAttentionReadingOptions

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        bound = self.options.streaming(site)
        if any(bound):
            plan.window, plan.sinks = self.options.recent, self.options.sinks
            plan.bound = None if all(bound) else bound
