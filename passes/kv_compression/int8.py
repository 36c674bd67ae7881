"""int8 KV cache: keys quantised per channel in blocks of 64 tokens, values per token; the newest block stays exact."""

from __future__ import annotations

from ..base import Decline, Fidelity, Method, MethodOptions, PassResult, Reason, RewriteContext


class Int8Options(MethodOptions):
    """int8 has no parameters: 8 bits, asymmetric, float16 scale and minimum per group."""


class Int8(Method):
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

    def apply(self, context: RewriteContext) -> PassResult:
        done, declines = [], []
        for site in context.anatomy.attentions:
            if site.key_cache.kind == "static":
                declines.append(Decline(site.name, Reason.STATIC_CACHE))
            elif site.key_cache.kind not in ("fresh", "concatenated", "sliced"):
                declines.append(Decline(site.name, Reason.NOT_CAUSAL, f"its cache is {site.key_cache.kind}"))
            elif site.head_dim % 8:
                declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, f"head_dim {site.head_dim} % 8 != 0"))
            elif context.fuel.take():
                context.plan(site).format = "int8"
                done.append(site.name)
        return self.result(done, declines)
