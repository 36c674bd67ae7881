"""What methods change about the work of a model: layers that run, tokens that are read, how a cache is stored.

Options are canonical here: family -> {"method": name, every parameter}, or a list of those, as ``torchaccel.options``
resolves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.spec import AttentionSpec
from .retrieving import RETRIEVING, Retrieving
from .stored import FORMATS, Formats, Method, Part, classes, dense, formats, of_heads
from .symbols import visible_pairs

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
# Those of sparse attention that are a window, everywhere and always.
WINDOWS = ("streaming_llm", "sliding_window")
KNOWN_METHODS = {
    "layer_skipping": ("unified",),
    "token_pruning": ("fastv",),
    "kv_compression": (*FORMATS, *EVICTING, "zipcache", "duo_attention"),
    "sparse_attention": (*WINDOWS, *RETRIEVING),
}


@dataclass(frozen=True)
class Traffic:
    """The effect of a set of methods on a decoder; without methods it is the exact model's."""

    methods: Methods

    @property
    def unknown(self) -> list[str]:
        """What of the methods is not modelled, as "family: method"; nothing may be predicted then."""
        return [
            f"{family}: {method['method']}" + _partly(method) + _varying(method)
            for family, known in KNOWN_METHODS.items()
            for method in self._asked(family)
            if method["method"] not in known or _partly(method) or _varying(method)
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

    def depths(self, layers: int, context: int) -> list[tuple[int, int, bool]]:
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
        method = self._one("sparse_attention", *WINDOWS)
        return (None, 0) if method is None else (method["window"], method.get("sinks", 0))

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

    def formats(self, dtype: str, head_dim: int) -> Formats:
        """How keys and values are stored, where all are stored alike."""
        method = self._storing
        return formats(method, dtype, head_dim) if method and method["method"] in FORMATS else dense(dtype, head_dim)

    @property
    def _storing(self) -> Method | None:
        """The method that decides in which format tokens are stored: the first, as of two the second is declined."""
        return next((m for m in self._asked("kv_compression") if m["method"] in (*FORMATS, "zipcache")), None)

    def parts(
        self, tokens: int, dtype: str, head_dim: int, kv_heads: int, layers: int, treated: bool = True
    ) -> tuple[Part, ...]:
        """What each of a layer's ``kv_heads`` stores of ``tokens``, on the average of all ``layers``.

        treated: as ``depths`` has it.
        """
        storing = self._storing
        if storing is not None and storing["method"] == "zipcache":
            return classes(storing, tokens, dtype, head_dim)
        duo = self._one("kv_compression", "duo_attention")
        if duo is not None:
            return (Part(of_heads(duo, tokens, kv_heads * layers), dense(dtype, head_dim), 4),)
        found = self.formats(dtype, head_dim)
        evicting = self._one("kv_compression", *EVICTING)
        if evicting is None or (not treated and Retrieving.of(evicting) is not None):
            return (Part(tokens, found),)
        return (Part(self.stored(tokens, kv_heads * sum(fmt.token_bytes for fmt in found)), found, 4),)

    def spec(self, phase: Any, dtype: str, head_dim: int, group: int, of: Formats | None = None) -> AttentionSpec:
        """The attention of one layer, or to a part of its cache that is stored as ``of``.

        A prompt attends over its own keys and values, which are in full precision.
        """
        stored = dense(dtype, head_dim) if phase == "prefill" else of or self.formats(dtype, head_dim)
        window, sinks = self.window
        return AttentionSpec(phase, head_dim, group, dtype, *stored, head_dim**-0.5, window=window, sinks=sinks)


def _varying(method: Method) -> str:
    """That what a step reads does not follow from the options, where it does not."""
    unknown = method["method"] in RETRIEVING and Retrieving.of(method) is None
    return " that reads what the options do not tell" if unknown else ""


def _partly(method: Method) -> str:
    """Where a method applies, when that is not everywhere."""
    layers = " on some of the layers" if method.get("layers") is not None else ""
    return layers + (f" in {method['phase']} only" if method.get("phase") else "")
