"""The predicted time of a candidate: its work over the rates of a device, and what calibration adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import sympy

from ..kernels.candidates import Candidate, Spec, kernel_name
from ..kernels.spec import DTYPES, AttentionSpec
from .calibration import Calibration, Coefficients, shipped
from .facts import DeviceFacts
from .shape import AttentionShape, LinearShape, Shape
from .symbols import attention_values, linear_values
from .work import Work, work

# Bytes that must be under way to keep a GPU's memory busy: bandwidth times its latency under load (Little's law).
LATENCY_US = 0.7
INFEASIBLE = float("inf")


@dataclass(frozen=True)
class Amounts:
    """The parts of ``Work`` as numbers."""

    size: float
    resident: float
    flops: float
    rows: float
    codes: float
    load: float
    pieces: float
    launches: float
    forks: float
    in_flight: float
    shared: float


@dataclass(frozen=True)
class Terms:
    """Milliseconds that a call would take for each reason alone, at the device's rates; rows and codes at 1 ns each.

    Either ``memory`` or ``cache`` is 0: a repeated call reads from the one or the other.
    """

    memory: float
    cache: float
    flops: float
    rows: float
    codes: float
    launches: float
    pieces: float
    feasible: bool

    def milliseconds(self, c: Coefficients) -> float:
        """Memory and arithmetic overlap, so the slower one counts; starting and merging comes on top."""
        if not self.feasible:
            return INFEASIBLE
        arithmetic = c.flops * self.flops + c.row_ns * self.rows + c.code_ns * self.codes
        rest = c.launch * self.launches + c.piece_us * self.pieces + c.call_us / 1e3
        return max(c.memory * self.memory + c.cache * self.cache, arithmetic) + rest


def work_of(spec: Spec, candidate: Candidate) -> Work:
    """The work of a candidate, in the symbols of ``cost.symbols``."""
    return work(kernel_name(spec), candidate.implementation, candidate.config, _is_quantised(spec))


def amounts(spec: Spec, candidate: Candidate, shape: Shape, processors: int) -> Amounts:
    """The work of a candidate for a call of ``shape`` on so many processors; raises ``TypeError`` for a wrong shape."""
    evaluate = _compiled(kernel_name(spec), candidate.implementation, candidate.config, _is_quantised(spec))
    if not isinstance(spec, AttentionSpec) and isinstance(shape, LinearShape):
        return Amounts(*evaluate(*linear_values(DTYPES[spec.dtype].itemsize, shape, processors)))
    if isinstance(spec, AttentionSpec) and isinstance(shape, AttentionShape):
        return Amounts(*evaluate(*attention_values(spec, shape, processors)))
    raise TypeError(f"a {type(spec).__name__} has no sizes of the kind {type(shape).__name__}")


def terms(spec: Spec, candidate: Candidate, shape: Shape, facts: DeviceFacts) -> Terms:
    """What the time of a candidate is made of on a device."""
    found = amounts(spec, candidate, shape, facts.processors)
    dtype = "float32" if candidate.implementation == "reference" else spec.dtype
    cached = found.resident * shape.sites <= facts.cache_bytes
    # Together they share a bandwidth, and the busiest one's share goes through what a single processor can draw.
    alone = facts.cache_gbs / facts.processors if cached else facts.processor_gbs
    memory = max(found.size / (facts.cache_gbs if cached else facts.dram_gbs), found.size * found.load / alone) / 1e6
    if found.in_flight:
        needed = facts.dram_gbs * LATENCY_US * 1e3 / facts.processors
        memory *= max(1.0, needed / found.in_flight)
    return Terms(
        memory=0.0 if cached else memory,
        cache=memory if cached else 0.0,
        flops=found.flops / facts.rate(dtype) / 1e6 * found.load * facts.processors,
        rows=found.rows * found.load / 1e6,
        codes=found.codes * found.load / 1e6,
        launches=(found.launches * facts.launch_us + found.forks * facts.fork_us) / 1e3,
        pieces=found.pieces / 1e3,
        feasible=found.shared <= facts.shared_bytes or facts.kind == "cpu",
    )


def predict_ms(
    spec: Spec, candidate: Candidate, shape: Shape, facts: DeviceFacts, calibration: Calibration | None = None
) -> float:
    """Milliseconds that one call of a candidate should take on a device; infinite where it does not fit the device.

    ``calibration`` defaults to the one that is shipped.
    """
    known = shipped() if calibration is None else calibration
    return terms(spec, candidate, shape, facts).milliseconds(known.of(spec, candidate, facts.kind))


def _is_quantised(spec: Spec) -> bool:
    return isinstance(spec, AttentionSpec) and (spec.key_format.is_quantised or spec.value_format.is_quantised)


@lru_cache(maxsize=256)
def _compiled(*key: Any) -> Callable[..., list[float]]:
    """Substitution into sympy's trees takes milliseconds, a compiled function microseconds."""
    found = work(*key)
    parts = [getattr(found, field.name) for field in fields(Amounts)]
    return sympy.lambdify(found.symbols, parts, modules="math", cse=True)
