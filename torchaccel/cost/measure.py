"""Facts of the device at hand, measured once in a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import probe
from .devices import LAUNCH_US, device_facts
from .facts import ESTIMATE, MEASURED, DeviceFacts

# Elements of the smallest pointwise operator that torch divides among threads: twice its grain of 32768.
PARALLEL = 65536
# float16 on a CPU runs at 0.3 GFLOP/s where torch has no kernel for it: a small product is enough to see that.
GEMM_EDGES = {"float32": 1024, "bfloat16": 2048, "float16": 192, "int8": 1024}
CALLS = 200


def facts_for(
    device: str | torch.device,
    load: Callable[[str], Mapping[str, Any] | None] | None = None,
    save: Callable[[str, dict[str, Any]], None] | None = None,
) -> DeviceFacts:
    """The facts of ``device``: "cpu" or "cuda" measured on this machine, any other name looked up in the table.

    ``load`` and ``save`` keep what was measured between processes: they get the device's name and the facts as
    ``DeviceFacts.to_dict`` gives them. What ``load`` returns and is no such dict is measured again. Raises
    ``ValueError`` for an unknown name.
    """
    if isinstance(device, str) and device.split(":")[0] not in ("cpu", "cuda"):
        return device_facts(device)
    place = torch.device(device)
    name = f"{probe.device_name(place)} x {torch.get_num_threads() if place.type == 'cpu' else 1}"
    found = load(name) if load is not None else None
    if found is not None:
        try:
            return DeviceFacts.from_dict(found)
        except (ValueError, TypeError):
            pass  # of another version of torchaccel, or damaged
    facts = measure(place)
    if save is not None:
        save(name, facts.to_dict())
    return facts


def measure(device: torch.device, *, megabytes: int = 256, scale: float = 1.0) -> DeviceFacts:
    """Measure ``device`` in under 10 s; every rate is the best of several.

    ``megabytes`` should be well above the caches; ``scale`` shrinks the matrix products. Facts that cannot be measured
    in that time are those of the table for a device of that name, else estimates.
    """
    rates = tuple(
        (name, probe.gemm_gflops(device, _dtype(name), int(edge * scale))) for name, edge in GEMM_EDGES.items()
    )
    return _measure_cpu(device, megabytes, rates) if device.type == "cpu" else _measure_gpu(device, megabytes, rates)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _measure_cpu(device: torch.device, megabytes: int, rates: tuple[tuple[str, float], ...]) -> DeviceFacts:
    large = probe.ReadProbe(device, megabytes)
    dram = max(large.gbs() for _ in range(3))
    with probe.one_thread():
        alone = max(large.gbs() for _ in range(2))
    cache, level2 = probe.cache_bytes(device), probe.cache_bytes(device, 2)
    # Half of the last-level cache: the other half may be other people's.
    small = probe.ReadProbe(device, max(1, cache // 2**21))
    from_cache = max(small.gbs() for _ in range(20))
    return DeviceFacts(
        name=probe.device_name(device),
        kind="cpu",
        processors=torch.get_num_threads(),
        dram_gbs=dram,
        cache_bytes=cache,
        cache_gbs=max(dram, from_cache),
        processor_gbs=min(dram, alone),
        gflops=rates,
        shared_bytes=level2,
        launch_us=_operator_us(device),
        fork_us=_fork_us(device),
        memory_bytes=probe.memory_bytes(device),
        source=MEASURED,
        sources=tuple((name, "operating system") for name in ("cache_bytes", "memory_bytes", "shared_bytes")),
    )


def _measure_gpu(device: torch.device, megabytes: int, rates: tuple[tuple[str, float], ...]) -> DeviceFacts:
    found = torch.cuda.get_device_properties(device)
    try:
        known: DeviceFacts | None = device_facts(found.name)
    except ValueError:
        known = None
    dram = max(probe.ReadProbe(device, 4 * megabytes).gbs() for _ in range(3))
    shared = int(getattr(found, "shared_memory_per_block_optin", 0)) or (known.shared_bytes if known else 48 * 2**10)
    return DeviceFacts(
        name=found.name,
        kind="cuda",
        processors=found.multi_processor_count,
        dram_gbs=dram,
        cache_bytes=probe.cache_bytes(device),
        # The clock flushes the cache, so its bandwidth cannot be seen with it.
        cache_gbs=max(dram, known.cache_gbs if known else 2 * dram),
        processor_gbs=known.processor_gbs if known else 3 * dram / found.multi_processor_count,
        gflops=rates,
        shared_bytes=shared,
        launch_us=min(_operator_us(device), 4 * LAUNCH_US),
        fork_us=0.0,
        memory_bytes=probe.memory_bytes(device),
        source=MEASURED,
        sources=(
            ("cache_bytes", "driver"),
            ("cache_gbs", ESTIMATE),
            ("processor_gbs", ESTIMATE),
            ("shared_bytes", "driver"),
        ),
    )


def _operator_us(device: torch.device) -> float:
    """Microseconds of the smallest operator: on a CPU its call, on a GPU its launch in a full stream."""
    one = torch.ones(1, device=device)

    def calls() -> None:
        for _ in range(CALLS):
            one.add_(1)

    return 1e3 * probe.best(calls, device) / CALLS


def _fork_us(device: torch.device) -> float:
    """Microseconds that dividing an operator among all threads costs: its time beyond an even share of one thread's."""
    x = torch.ones(PARALLEL)

    def calls() -> None:
        for _ in range(CALLS):
            torch.neg(x, out=x)

    together = probe.best(calls, device)
    with probe.one_thread():
        alone = probe.best(calls, device)
    return max(0.5, 1e3 * (together - alone / torch.get_num_threads()) / CALLS)
