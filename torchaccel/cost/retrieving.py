"""What decode steps of methods that retrieve read, and what they keep besides the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retrieving:
    """A step reads ``listed`` stored tokens and the part ``part`` of them, and all of what these are chosen by.

    dense: layers that read, and keep, everything. state: bytes of what tokens are chosen by, as a part of those of the
    stored keys and values of 16 bits. interval: steps that read by one choice. least: stored tokens up to which a step
    reads everything.
    """

    dense: int
    listed: int
    part: float
    state: float
    interval: int = 1
    least: int = 0

    def read(self, tokens: float) -> float:
        """How many of ``tokens`` stored ones a step reads, what they are chosen by counted as tokens, too."""
        chosen = self.listed + self.part * tokens
        whole = tokens <= self.least or chosen >= tokens
        return tokens if whole else min(tokens, chosen + self.state / self.interval * tokens)

    @staticmethod
    def of(method: Mapping[str, Any]) -> Retrieving | None:
        """What a method of canonical options does; None for one that does not retrieve, or as the text wants it."""
        known = RETRIEVING.get(method["method"])
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


def _double_sparsity(method: Mapping[str, Any]) -> Retrieving:
    return Retrieving(method["dense_layers"], method["tokens"], 0.0, method["density"] / 2)


def _infllm(method: Mapping[str, Any]) -> Retrieving:
    # The mean of every 16 keys.
    listed = method["blocks"] * 64 + method["window"]
    return Retrieving(method["dense_layers"], listed, 0.0, 1 / 32, least=method["dense_len"])


def _lserve(method: Mapping[str, Any]) -> Retrieving | None:
    # How many heads stream is for a plan to say, and for the model's number of heads.
    if method.get("plan") is not None or method.get("retrieval_heads") is not None:
        return None
    pages = max(3, method["tokens"] // method["page"]) * method["page"]
    return Retrieving(method["dense_layers"], pages, 0.0, 1 / method["part"], method["interval"])


def _recycled(method: Mapping[str, Any]) -> Retrieving | None:
    full = 1 / method["stride"]
    if method["schedule"] != "fixed":
        return None
    return Retrieving(method["dense_layers"], round((1 - full) * method["tokens"]), full, 0.0)


def _tidal(method: Mapping[str, Any]) -> Retrieving:
    again = method.get("reselect")
    choosing = 1 + (1 if again is None else len(again))
    return Retrieving(method["dense_layers"] + choosing, method["tokens"], 0.0, 0.0)


RETRIEVING: Mapping[str, Callable[[Mapping[str, Any]], Retrieving | None]] = {
    "quest": _quest,
    "double_sparsity": _double_sparsity,
    "infllm_v2": _infllm,
    "lserve": _lserve,
    "recycled_attention": _recycled,
    "tidal_decode": _tidal,
    "mpcache": _mpcache,
    "sentence_kv": _sentence_kv,
}
