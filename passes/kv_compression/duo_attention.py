"""DuoAttention: some KV heads keep every token, the others their attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import HeadWindows, Prompt, RaggedEviction

from ..base import Decline, Fidelity, Reason, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache


class DuoAttentionOptions(LayerwiseOptions):
    """retrieval_heads: for each layer the KV heads that keep everything, none in layers without an entry. sinks,
    recent: first and last tokens that the other heads keep."""

    retrieval_heads: dict[int, tuple[int, ...]]
    sinks: int = Field(default=64, ge=0, le=65536)
    recent: int = Field(default=256, ge=1, le=1 << 20)

    @field_validator("retrieval_heads")
    @classmethod
    def _natural(cls, value: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        if any(number < 0 for layer, heads in value.items() for number in (layer, *heads)):
            raise ValueError("layers and heads are counted from 0")
        return {layer: tuple(sorted(set(heads))) for layer, heads in sorted(value.items())}


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


class DuoAttention(LayerwiseMethod):
    """Attention of the prompt is full in all heads; later tokens see all of it in retrieval heads only."""

    name = "duo_attention"
    family = "kv_compression"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024)"
    calibration = "required"
    Options = DuoAttentionOptions

    options: DuoAttentionOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        wrong = [head for head in self._retrieving(site) if head >= site.kv_heads]
        if wrong:
            return Decline(site.name, Reason.NO_SUCH_HEAD, f"KV head {wrong[0]} of {site.kv_heads}")
        return refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        retrieving = self._retrieving(site)
        bound = tuple(head not in retrieving for head in range(site.kv_heads))
        if any(bound):
            plan.eviction = DuoAttentionPolicy(HeadWindows(bound, self.options.sinks, self.options.recent))

    def _retrieving(self, site: AttentionSite) -> tuple[int, ...]:
        layer: Any = site.index if site.layer is None else site.layer
        return self.options.retrieval_heads.get(layer, ())
