"""What decode steps of methods that retrieve read, and what they keep besides the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retrieving:
    """A step reads ``listed`` stored tokens and the part ``part`` of them, and all of what these are chosen by.

    dense: first layers that read, and keep, everything. state: bytes of what tokens are chosen by, as a part of those
    of the stored keys and values of 16 bits.
    """

    dense: int
    listed: int
    part: float
    state: float

    def read(self, tokens: float) -> float:
        """How many of ``tokens`` stored ones a step reads, what they are chosen by counted as tokens, too."""
        chosen = self.listed + self.part * tokens
        return tokens if chosen >= tokens else min(tokens, chosen + self.state * tokens)

    @staticmethod
    def of(method: Mapping[str, Any]) -> Retrieving | None:
        """What a method of canonical options does; None for one that does not retrieve."""
        known = _KNOWN.get(method["method"])
        return None if known is None else known(method)


def _quest(method: Mapping[str, Any]) -> Retrieving:
    # Two keys of every page, of the keys and values of all.
    page = method["page"]
    return Retrieving(method["dense_layers"], max(3, method["tokens"] // page) * page, 0.0, 1 / page)


def _mpcache(method: Mapping[str, Any]) -> Retrieving:
    # Two keys of every cluster of 16 and of 32, in one of the layers that share them; two clusters are always read.
    return Retrieving(method["dense_layers"], 32, method["fine"], (1 / 16 + 1 / 32) / method["share"])


def _sentence_kv(method: Mapping[str, Any]) -> Retrieving:
    # A float32 vector for every 8 tokens, which are room for sentences of that many.
    return Retrieving(method["dense_layers"], method["tokens"], 0.0, 1 / 8)


_KNOWN: Mapping[str, Callable[[Mapping[str, Any]], Retrieving]] = {
    "quest": _quest,
    "mpcache": _mpcache,
    "sentence_kv": _sentence_kv,
}
