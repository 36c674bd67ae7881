"""What a device can do, in the few numbers that the cost model needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

UNITS = {
    "processors": "cores or multiprocessors",
    "dram_gbs": "GB/s",
    "cache_bytes": "bytes",
    "cache_gbs": "GB/s",
    "processor_gbs": "GB/s",
    "gflops": "GFLOP/s",
    "shared_bytes": "bytes",
    "launch_us": "microseconds",
    "fork_us": "microseconds",
    "memory_bytes": "bytes",
}
MEASURED = "measured"
ESTIMATE = "estimate"


@dataclass(frozen=True)
class DeviceFacts:
    """Facts of one device; the unit of each is in ``UNITS``, where it comes from in ``source_of``.

    kind: the torch device type. processors: cores of a CPU, multiprocessors of a GPU. dram_gbs, cache_gbs: what all
    processors together read from memory and from the last-level cache of ``cache_bytes``. processor_gbs: what one
    processor can draw from memory by itself. gflops: dense matrix products by dtype name (never the rates that 2:4
    sparsity doubles). shared_bytes: fast memory of one thread block; of a core its L2 cache. launch_us: starting one
    kernel, or calling one operator on a CPU. fork_us: waking and joining the threads of a CPU.
    source: where the facts come from; sources: where that differs, by fact.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    processors: int
    dram_gbs: float
    cache_bytes: int
    cache_gbs: float
    processor_gbs: float
    gflops: tuple[tuple[str, float], ...]
    shared_bytes: int
    launch_us: float
    fork_us: float
    memory_bytes: int
    source: str
    sources: tuple[tuple[str, str], ...] = ()

    def rate(self, dtype: str) -> float:
        """Dense GFLOP/s in ``dtype``, or in float32 where the device has no rate for it."""
        rates = dict(self.gflops)
        return rates.get(dtype, rates["float32"])

    def source_of(self, fact: str) -> str:
        """Where a fact comes from: "vendor data sheet", "measured", "estimate" or something more exact."""
        if fact not in UNITS:
            raise ValueError(f"a device has no fact {fact!r}; its facts are {', '.join(UNITS)}")
        return dict(self.sources).get(fact, self.source)

    @property
    def is_measured(self) -> bool:
        """Whether the facts were measured on the very device, not looked up."""
        return self.source == MEASURED

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self) | {"gflops": dict(self.gflops), "sources": dict(self.sources)}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> DeviceFacts:
        """The facts whose ``to_dict`` is ``found``; raises ``ValueError`` for anything else."""
        names = {field.name for field in fields(DeviceFacts)}
        if set(found) != names:
            odd = ", ".join(sorted(set(found) ^ names))
            raise ValueError(f"these are not the facts of a device: missing or unknown {odd}; measure them again")
        pairs = {name: tuple((str(k), v) for k, v in dict(found[name]).items()) for name in ("gflops", "sources")}
        facts = DeviceFacts(**{**found, **pairs})
        numbers = [getattr(facts, name) for name in UNITS if name != "gflops"] + [rate for _, rate in facts.gflops]
        if "float32" not in dict(facts.gflops) or not all(isinstance(x, int | float) and x >= 0 for x in numbers):
            raise ValueError(
                f"the facts of {facts.name!r} are not numbers of at least 0 with a float32 rate; measure again"
            )
        return facts
