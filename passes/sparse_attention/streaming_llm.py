"""StreamingLLM: every query sees the first tokens (attention sinks) and a window of recent ones."""

from __future__ import annotations

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Fidelity, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache


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
        return refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.window, plan.sinks = self.options.window, self.options.sinks
