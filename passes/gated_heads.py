"""DuoAttention's heads, for both families: retrieval heads see every token, the others sinks and a window."""

from __future__ import annotations

from typing import ClassVar

from torchaccel.calibration.head_gates import HeadGates
from torchaccel.graph.anatomy import AttentionSite

from .base import Decline, Fidelity
from .calibrated import CalibratedMethod
from .layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache
from .streaming_heads import StreamingHeadsOptions


class GatedHeadsOptions(StreamingHeadsOptions, LayerwiseOptions):
    """As ``StreamingHeadsOptions``."""


class GatedHeadsMethod(CalibratedMethod, LayerwiseMethod):
    """Subclasses say in ``treat`` what becomes of the streaming heads, ``bound``; both go by the same plans."""

    name = "duo_attention"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024)"
    calibration = "required"
    calibrator = HeadGates
    Options: ClassVar[type[GatedHeadsOptions]]

    options: GatedHeadsOptions

    @property
    def lacks_plan(self) -> bool:
        return not self.options.named

    def refuse(self, site: AttentionSite) -> Decline | None:
        return self.options.refuse(site) or refuse_cache(site, sliding=False)
