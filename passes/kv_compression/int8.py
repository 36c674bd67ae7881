"""int8 KV cache: keys quantised per channel in blocks of 64 tokens, values per token; the newest block stays exact."""

from __future__ import annotations

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Fidelity, Reason, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions


class Int8Options(LayerwiseOptions):
    """int8 has no parameters of its own: 8 bits, asymmetric, float16 scale and minimum per group."""


class Int8(LayerwiseMethod):
    """Stores every cached token in 8 bits; prefill attends in full precision and quantises afterwards.

    Keys have a few large channels, so their groups run along 64 tokens of one channel; values have none, so theirs run
    along the channels of one token (KIVI).
    """

    name = "int8"
    family = "kv_compression"
    aliases = ("q8", "kv8")
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024), at 8 bits"
    Options = Int8Options

    def refuse(self, site: AttentionSite) -> Decline | None:
        if site.key_cache.kind == "static":
            return Decline(site.name, Reason.STATIC_CACHE)
        if site.key_cache.kind not in ("fresh", "concatenated", "sliced"):
            return Decline(site.name, Reason.NOT_CAUSAL, f"its cache is {site.key_cache.kind}")
        if site.head_dim % 8:
            return Decline(site.name, Reason.KERNEL_UNSUPPORTED, f"head_dim {site.head_dim} % 8 != 0")
        return None

    def treat(self, plan: SitePlan) -> None:
        plan.format = "int8"
