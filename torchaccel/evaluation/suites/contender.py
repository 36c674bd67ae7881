"""What takes part in a scenario of a suite, and what the scenario is to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...cost.probe import cache_bytes
from ...kernels import kv_format, registry
from ...kernels.spec import KVFormat

# The copies of a cache that calls take in turn are together this many times as large as the last-level cache.
COLD = 4


@dataclass
class Contender:
    """One implementation: calls over different contents, taken in turn, and what a call has to read and compute.

    read_bytes, flops: of one call, at least. error: largest distance of its first result to float32, None where it
    attends to something else. density: share of the keys, or (query, key) pairs, that it reads.
    """

    label: str
    calls: Sequence[Callable[[], object]]
    read_bytes: float
    flops: float
    dtype: str = "bfloat16"
    error: float | None = None
    density: float | None = None
    turn: int = field(default=0, repr=False)

    @torch.no_grad()
    def __call__(self) -> object:
        """The next call in turn."""
        self.turn += 1
        return self.calls[(self.turn - 1) % len(self.calls)]()


@dataclass(frozen=True)
class Goal:
    """What a contender is to reach: a number from the medians in ms by label, and at least ``asked``."""

    label: str
    text: str
    asked: float
    reached: Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Scenario:
    """Contenders that are timed interleaved, and the goals that are judged by their medians.

    ``goals`` gets the read bandwidth of the same moments, in GB/s. burst: calls in a row that make up one sample, as
    the layers of a model do: data is cold in each of them, code in the first one only.
    """

    name: str
    contenders: Sequence[Contender]
    goals: Callable[[float], Sequence[Goal]]
    rounds: int
    burst: int = 1


def copies(nbytes: float, device: torch.device) -> int:
    """Contents of ``nbytes`` that it takes to leave the caches cold; on a GPU the clock flushes them."""
    return 1 if device.type == "cuda" else max(1, int(-(-COLD * cache_bytes(device) // nbytes)))


def stored(fmt: KVFormat, tokens: Tensor, room: int = 1) -> Tensor:
    """A buffer in ``fmt`` that holds ``tokens`` ``[B, H, n, D]`` and has room for ``room`` more."""
    batch, heads, length, _ = tokens.shape
    buf = kv_format.allocate(fmt, batch, heads, length + room, tokens.device)
    registry.append(fmt, tokens.device.type).run(buf, 0, tokens)
    return buf
