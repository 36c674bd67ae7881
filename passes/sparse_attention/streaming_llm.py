"""StreamingLLM: every query sees the first tokens (attention sinks) and a window of recent ones."""

from __future__ import annotations

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Fidelity, Reason, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions


class StreamingLLMOptions(LayerwiseOptions):
    """sinks: first real tokens of a row that stay visible. window: recent tokens visible, the query's own included."""

    sinks: int = Field(default=4, ge=0, le=4096)
    window: int = Field(default=1024, ge=1)


class StreamingLLM(LayerwiseMethod):
    """Restricts causal attention to sinks and window in prefill, extend and decode; positions stay absolute.

    Only those keys are read: time and traffic stop growing with the context. The cache keeps every token, so the
    method can be changed between calls.
    """

    name = "streaming_llm"
    family = "sparse_attention"
    aliases = ("a_shape", "streaming")
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "Efficient Streaming Language Models with Attention Sinks (2023)"
    Options = StreamingLLMOptions

    options: StreamingLLMOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        kind = site.key_cache.kind
        if kind == "static":
            return Decline(site.name, Reason.STATIC_CACHE)
        if kind not in ("fresh", "concatenated", "sliced"):
            return Decline(site.name, Reason.NOT_CAUSAL, f"its cache is {kind}")
        if kind == "sliced" or site.key_cache.window is not None:
            return Decline(site.name, Reason.SLIDING_WINDOW)
        return None

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.window, plan.sinks = self.options.window, self.options.sinks
