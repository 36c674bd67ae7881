"""The frozen descriptions of what is kept of keys, and of how blocks or tokens are chosen by it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True)
class SummarySpec:
    """What is kept of the keys of one layer, so that a query can tell which of them matter.

    kind "minmax": for every ``block`` slots the least and the greatest key per channel, ``[B, H_kv, N, 2, D]`` (Quest,
    arXiv:2406.10774). "mean": their mean, ``[B, H_kv, N, D]`` (InfLLM, arXiv:2402.04617). "channels": of every slot
    ``channels`` values chosen beforehand, ``[B, H_kv, C, channels]``, block 1 (Double Sparsity, arXiv:2408.07092).
    dtype: of the keys. stored: of the summary. Keys kept in their own dtype, or in float32, lie within their bounds
    exactly; a narrower dtype rounds the bounds to nearest.
    """

    kind: Literal["minmax", "mean", "channels"]
    head_dim: int
    dtype: str
    stored: str
    block: int = 64
    channels: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or (self.kind == "channels" and self.block != 1):
            raise ValueError(
                f"a summary of {self.kind} has blocks of {self.block} slots: give block >= 1, 1 for channels"
            )
        if not (1 <= self.channels <= self.head_dim if self.kind == "channels" else self.channels == 0):
            raise ValueError(
                f"kind {self.kind!r} with channels={self.channels}: give 1 to head_dim for 'channels', else 0"
            )

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of what is kept of one block."""
        return {"minmax": (2, self.head_dim), "mean": (self.head_dim,), "channels": (self.channels,)}[self.kind]

    def key(self) -> str:
        """Canonical JSON of the spec."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_key(key: str) -> SummarySpec:
        """The spec whose ``key()`` is ``key``."""
        return SummarySpec(**json.loads(key))


@dataclass(frozen=True)
class SelectionSpec:
    """Which blocks of a cache the queries of a decode step read: ``width`` entries per KV head, chosen by a summary.

    The score of a summary's row is the query's product with it: for "minmax" the upper bound
    ``sum_d max(q_d min_d, q_d max_d)`` of q . k, for "mean" and "channels" the dot product. ``reduce`` over the
    ``group`` query heads of a KV head: "max", "mean", or "softmax", the sum of the heads' probabilities over all rows
    at ``scale`` (NSA, InfLLM v2). Then the greatest over the queries, and over the ``pool`` rows that make one block of
    the result (LServe, arXiv:2502.14866). NaN counts as infinity, so that it is read and shows.
    The first ``sinks`` and the last ``recent`` live blocks are always chosen, and are part of ``width``; the rest are
    the best, lower numbers first among equals. With ``mass`` below 1, of these only the best few until the chosen hold
    this part of the softmax at ``scale`` (of the sum of scores after reduce "softmax"); more than ``width`` never.
    dtype: of the queries.
    """

    summary: SummarySpec
    group: int
    dtype: str
    width: int
    reduce: Literal["max", "mean", "softmax"] = "max"
    scale: float = 1.0
    pool: int = 1
    sinks: int = 0
    recent: int = 0
    mass: float = 1.0

    def __post_init__(self) -> None:
        _check_choice(self.width, self.sinks, self.recent, self.mass)

    @property
    def block(self) -> int:
        """Slots that an entry of the result stands for: ``index_block`` of the attention that reads them."""
        return self.summary.block * self.pool

    @property
    def probabilities(self) -> bool:
        """Whether scores are probabilities already."""
        return self.reduce == "softmax"

    def key(self) -> str:
        """Canonical JSON of the spec."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_key(key: str) -> SelectionSpec:
        """The spec whose ``key()`` is ``key``."""
        fields = json.loads(key)
        return SelectionSpec(**{**fields, "summary": SummarySpec(**fields["summary"])})


@dataclass(frozen=True)
class PromptSelectionSpec:
    """Which blocks of keys every block of a prompt's queries reads: ``width`` entries per query head and block, or 0
    for as many as the prompt has blocks.

    estimate "antidiagonal": the tokens of every ``stride`` by ``stride`` tile whose numbers within it add to stride - 1
    are multiplied, summed, and a causal softmax over a row of tiles (at ``scale / stride``) gives probabilities, which
    are summed per block: a vertical or a slanted line crosses every antidiagonal (XAttention, arXiv:2503.16428).
    "mean": the mean query of a block times the mean key of another (FlexPrefill, arXiv:2502.20766; MInference).
    Means and sums run over live tokens only. softcap: what estimates at scale are bent to, as scores are by
    ``softcap * tanh(x / softcap)``; None for as they are.
    sinks, recent, mass, width: as in ``SelectionSpec``; the last live block is the diagonal one. Queries wholly in the
    padding choose nothing. dtype: of queries and keys.
    """

    estimate: Literal["antidiagonal", "mean"]
    head_dim: int
    group: int
    dtype: str
    scale: float
    width: int
    block: int = 64
    stride: int = 16
    sinks: int = 1
    recent: int = 1
    mass: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _check_choice(self.width or 1 + self.sinks + self.recent, self.sinks, self.recent, self.mass)
        if self.stride < 1 or self.block % self.stride:
            raise ValueError(f"blocks of {self.block} tokens hold no whole number of strides of {self.stride}")

    @property
    def probabilities(self) -> bool:
        """Whether scores are probabilities already."""
        return self.estimate == "antidiagonal"

    def key(self) -> str:
        """Canonical JSON of the spec."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_key(key: str) -> PromptSelectionSpec:
        """The spec whose ``key()`` is ``key``."""
        return PromptSelectionSpec(**json.loads(key))


def _check_choice(width: int, sinks: int, recent: int, mass: float) -> None:
    if min(sinks, recent) < 0 or width < max(1, sinks + recent):
        raise ValueError(f"width {width} has no room for {sinks} sinks and {recent} recent blocks: make it larger")
    if not 0 < mass <= 1:
        raise ValueError(f"mass is a part of a softmax, above 0 and at most 1; found {mass}")
