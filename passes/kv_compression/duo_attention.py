"""DuoAttention: some KV heads keep every token, the others their attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import HeadWindows, Prompt, RaggedEviction

from ..base import SitePlan
from ..gated_heads import GatedHeadsMethod, GatedHeadsOptions


class DuoAttentionOptions(GatedHeadsOptions):
    """sinks, recent: first and last tokens that streaming heads keep."""


@dataclass(frozen=True)
class DuoAttentionPolicy(RaggedEviction):
    """What a layer's heads see is a matter of windows; what has left them is dropped as storage is made anew."""

    windows: HeadWindows

    def kept(self, prompt: Prompt) -> Tensor:
        valid = prompt.valid
        # Counted from either end of the row, without its padding.
        first, last = valid.cumsum(-1), valid.flip(-1).cumsum(-1).flip(-1)
        near = (first <= self.windows.sinks) | (last <= self.windows.recent + self.windows.REWIND)
        free = ~valid.new_tensor(self.windows.bound)
        return valid[:, None] & (near[:, None] | free[None, :, None])


class DuoAttention(GatedHeadsMethod):
    """Attention of the prompt is full in all heads; later tokens see all of it in retrieval heads only."""

    family = "kv_compression"
    Options = DuoAttentionOptions

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        bound = self.options.streaming(site)
        if any(bound):
            plan.eviction = DuoAttentionPolicy(HeadWindows(bound, self.options.sinks, self.options.recent))
