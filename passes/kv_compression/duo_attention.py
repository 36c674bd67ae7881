"""DuoAttention: some KV heads keep every token, the others their attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchaccel.calibration.head_gates import HeadGates
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import HeadWindows, Prompt, RaggedEviction

from ..base import Decline, Fidelity, SitePlan
from ..calibrated import CalibratedMethod
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache
from ..streaming_heads import StreamingHeadsOptions


class DuoAttentionOptions(StreamingHeadsOptions, LayerwiseOptions):
    """As ``StreamingHeadsOptions``; streaming heads keep their sinks and recent tokens only."""


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


class DuoAttention(CalibratedMethod, LayerwiseMethod):
    """Attention of the prompt is full in all heads; later tokens see all of it in retrieval heads only."""

    name = "duo_attention"
    family = "kv_compression"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024)"
    calibration = "required"
    calibrator = HeadGates
    Options = DuoAttentionOptions

    options: DuoAttentionOptions

    @property
    def lacks_plan(self) -> bool:
        return not self.options.named

    def refuse(self, site: AttentionSite) -> Decline | None:
        return self.options.refuse(site) or refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        bound = self.options.streaming(site)
        if any(bound):
            plan.eviction = DuoAttentionPolicy(HeadWindows(bound, self.options.sinks, self.options.recent))
