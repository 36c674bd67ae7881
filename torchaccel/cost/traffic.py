"""What methods change about the work of a model: layers that run, tokens that are read, how a cache is stored.

Options are canonical here: family -> {"method": name, every parameter}, or a list of those, as ``torchaccel.options``
resolves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.spec import BITS, AttentionSpec, KVFormat
from .retrieving import Retrieving
from .symbols import visible_pairs

Method = Mapping[str, Any]
Methods = Mapping[str, Method | Sequence[Method]]

EVICTING = (
    "streaming_llm",
    "h2o",
    "snapkv",
    "pyramidkv",
    "adakv",
    "expected_attention",
    "tova",
    "lazy_eviction",
    "critic",
    "loopserve",
    "look_m",
    "video_xl",
    "random",
    "mpcache",
    "sentence_kv",
)
KNOWN_METHODS = {
    "layer_skipping": ("unified",),
    "token_pruning": ("fastv",),
    "kv_compression": (*BITS, *EVICTING),
    "sparse_attention": ("streaming_llm", "quest"),
}


@dataclass(frozen=True)
class Traffic:
    """The effect of a set of methods on a decoder; without methods it is the exact model's."""

    methods: Methods

    @property
    def unknown(self) -> list[str]:
        """What of the methods is not modelled, as "family: method"; nothing may be predicted then."""
        return [
            f"{family}: {method['method']}" + _partly(method)
            for family, known in KNOWN_METHODS.items()
            for method in self._asked(family)
            if method["method"] not in known or _partly(method)
        ]

    def _asked(self, family: str) -> list[Method]:
        found = self.methods.get(family, [])
        return [found] if isinstance(found, Mapping) else list(found)

    def _one(self, family: str, *names: str) -> Method | None:
        """The method of a family, among ``names`` when given; the last one where several are asked for."""
        return next((m for m in reversed(self._asked(family)) if not names or m["method"] in names), None)

    def decode_layers(self, layers: int) -> int:
        """How many of ``layers`` run for a new token."""
        method = self._one("layer_skipping")
        return layers if method is None else max(2, int(layers / method["target_speedup"]))

    def prompt_lengths(self, layers: int, context: int) -> list[tuple[int, int]]:
        """(tokens, layers) of the parts of the depth: token pruning shortens the later one."""
        method = self._one("token_pruning")
        if method is None:
            return [(context, layers)]
        first = min(method["layer"], layers)
        return [(context, first), (max(1, round(context * method["keep"])), layers - first)]

    @property
    def retrieving(self) -> Retrieving | None:
        """What steps read where a method chooses it anew for each; None where no method does."""
        asked = [*self._asked("sparse_attention"), *self._asked("kv_compression")]
        return next((found for method in asked if (found := Retrieving.of(method)) is not None), None)

    def parts(self, layers: int, context: int) -> list[tuple[int, int, bool]]:
        """As ``prompt_lengths``, with first layers apart that a method leaves dense: False for these."""
        dense = 0 if self.retrieving is None else self.retrieving.dense
        found = []
        for tokens, count in self.prompt_lengths(layers, context):
            first = min(dense, count)
            dense -= first
            found += [(tokens, first, False)] * (first > 0) + [(tokens, count - first, True)] * (count > first)
        return found

    @property
    def window(self) -> tuple[int | None, int]:
        """Window and sinks of sparse attention; (None, 0) for attention to everything."""
        method = self._one("sparse_attention")
        return (None, 0) if method is None or "window" not in method else (method["window"], method["sinks"])

    def stored(self, tokens: int, token_bytes: float) -> int:
        """How many of ``tokens`` a layer keeps; token_bytes: of one token's keys and values, all KV heads."""
        method = self._one("kv_compression", *EVICTING)
        if method is None:
            return tokens
        if method["method"] == "sentence_kv":
            return min(tokens, int(method["tokens"] * method["factor"]) + method["window"])
        if "tokens" in method:
            return min(tokens, method["tokens"])
        if "ratio" in method:
            return max(1, int(tokens * method["ratio"]))
        return min(tokens, max(1, int(method["bytes"] / token_bytes)))

    def visible(self, tokens: int) -> int:
        """How many of ``tokens`` stored ones a new token reads."""
        window, sinks = self.window
        return tokens if window is None else min(tokens, window + sinks)

    def visible_pairs(self, tokens: int) -> int:
        """(query, key) pairs that causal attention of a prompt of ``tokens`` computes."""
        return int(visible_pairs(tokens, tokens, True, *self.window))

    def formats(self, dtype: str, head_dim: int) -> tuple[KVFormat, KVFormat]:
        """How keys and values are stored."""
        method = self._one("kv_compression", *BITS)
        if method is None:
            return KVFormat("dense", dtype, head_dim), KVFormat("dense", dtype, head_dim)
        name = method["method"]
        chosen = {key: method[key] for key in ("block", "group", "window") if method.get(key) is not None}
        keys = KVFormat(name, dtype, head_dim, "channel", packing="channel", **chosen)
        return keys, KVFormat(name, dtype, head_dim, "token", packing="token", **chosen)

    def spec(self, phase: Any, dtype: str, head_dim: int, group: int) -> AttentionSpec:
        """The attention of one layer; a prompt attends over its own keys and values, which are in full precision."""
        formats = self.formats(dtype, head_dim) if phase == "decode" else Traffic({}).formats(dtype, head_dim)
        window, sinks = self.window
        return AttentionSpec(phase, head_dim, group, dtype, *formats, head_dim**-0.5, window=window, sinks=sinks)


def _partly(method: Method) -> str:
    """Where a method applies, when that is not everywhere."""
    layers = " on some of the layers" if method.get("layers") is not None else ""
    return layers + (f" in {method['phase']} only" if method.get("phase") else "")
