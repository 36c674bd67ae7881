"""The table of devices that need not be present: vendor figures, dense rates only, and estimates marked as such."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache

from .facts import ESTIMATE, DeviceFacts

VENDOR = "vendor data sheet"
HALVED = "vendor data sheet, half of its figure with 2:4 sparsity"
KIB, MIB, GIB = 2**10, 2**20, 2**30
# What a multiprocessor reads from L2 in a clock. No vendor publishes what one draws by itself.
L2_BYTES_PER_CLOCK = 64
# A launch in stream order takes 2 to 4 us on every GPU of the table.
LAUNCH_US = 3.0

# Processors; DRAM GB/s; last-level cache MiB, its GB/s; GHz; TFLOP/s in float32 outside of tensor cores, in bfloat16
# and float16, in int8; KiB of shared memory of a block; GB of memory; source of the FLOP rates.
_GPUS: dict[str, tuple[str, int, int, int, int, float, tuple[float, float, float], int, int, str]] = {
    "a100": ("A100-80GB SXM", 108, 2039, 40, 7200, 1.41, (19.5, 312, 624), 163, 80, VENDOR),
    "h100": ("H100 SXM", 132, 3350, 50, 5500, 1.83, (67, 989.4, 1978.9), 227, 80, HALVED),
    "h200": ("H200 SXM", 132, 4800, 50, 5500, 1.83, (67, 989.4, 1978.9), 227, 141, HALVED),
    "b200": ("B200 SXM", 148, 8000, 126, 10000, 1.85, (80, 2250, 4500), 227, 180, HALVED),
    "rtx4090": ("GeForce RTX 4090", 128, 1008, 72, 5000, 2.52, (82.6, 165.2, 660.6), 99, 24, VENDOR),
    "l40s": ("L40S", 142, 864, 96, 5000, 2.52, (91.6, 362, 733), 99, 48, VENDOR),
    "mi300x": ("Instinct MI300X", 304, 5300, 256, 17200, 2.1, (163.4, 1307.4, 2614.9), 64, 192, VENDOR),
}
_GPU_ESTIMATES = {
    "cache_gbs": ESTIMATE,
    "processor_gbs": f"estimate: {L2_BYTES_PER_CLOCK} bytes a clock",
    "launch_us": "estimate: 2 to 4 us in stream order",
}

# DRAM GB/s; GHz; FLOPs of a core and clock in float32, bfloat16, float16, int8: two units, each a multiply and an add
# in every lane; KiB of L2. Where products of 16 bits are missing bfloat16 is widened first; float16 is scalar code.
_CPUS: dict[str, tuple[str, int, float, tuple[int, int, int, int], int]] = {
    "avx2": ("generic AVX2 CPU", 100, 2.8, (32, 16, 1, 64), 512),
    "avx512": ("generic AVX-512 CPU", 140, 2.6, (64, 32, 1, 128), 1024),
    "avx512_bf16": ("generic AVX-512 CPU with BF16 and VNNI", 200, 2.6, (64, 128, 1, 256), 1024),
    "amx": ("generic AMX CPU", 200, 2.4, (64, 1024, 1, 2048), 2048),
    "neon": ("generic NEON CPU", 150, 2.8, (32, 64, 64, 128), 1024),
}
_CORES = 16
_CPU_SOURCE = f"estimate: {_CORES} cores of a server socket"
_DTYPES = ("float32", "bfloat16", "float16", "int8")


def device_names() -> tuple[str, ...]:
    """The names that ``device_facts`` knows."""
    return (*_GPUS, *_CPUS)


@lru_cache(maxsize=64)
def device_facts(name: str) -> DeviceFacts:
    """The facts of the device called ``name``, such as "h200", "H200 SXM" or "rtx-4090".

    Raises ``ValueError`` for a name that is not in the table.
    """
    plain = _plain(name)
    for key in device_names():
        row = _GPUS.get(key) or _CPUS[key]
        if plain in {_plain(f"{maker}{word}") for maker in ("", "nvidia", "amd") for word in (key, row[0])}:
            return _gpu(key) if key in _GPUS else _cpu(key)
    near = difflib.get_close_matches(plain, device_names(), 1, 0.4)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(
        f"unknown device {name!r}{hint}. Known: {', '.join(device_names())}, "
        "and 'cpu' or 'cuda' for that of this machine, measured"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9_]", "", name.lower())


def _gpu(key: str) -> DeviceFacts:
    name, processors, dram, cache, cache_gbs, clock, tflops, shared, memory, rates = _GPUS[key]
    single, half, int8 = (1000 * rate for rate in tflops)
    origins = _GPU_ESTIMATES | {"gflops": rates}
    return DeviceFacts(
        name=name,
        kind="cuda",
        processors=processors,
        dram_gbs=dram,
        cache_bytes=cache * MIB,
        cache_gbs=cache_gbs,
        processor_gbs=L2_BYTES_PER_CLOCK * clock,
        gflops=tuple(zip(_DTYPES, (single, half, half, int8), strict=True)),
        shared_bytes=shared * KIB,
        launch_us=LAUNCH_US,
        fork_us=0.0,
        memory_bytes=memory * 10**9,
        source=VENDOR,
        sources=tuple(sorted(origins.items())),
    )


def _cpu(key: str) -> DeviceFacts:
    name, dram, clock, flops, l2 = _CPUS[key]
    return DeviceFacts(
        name=name,
        kind="cpu",
        processors=_CORES,
        dram_gbs=dram,
        cache_bytes=32 * MIB,
        cache_gbs=_CORES * 25.0,
        processor_gbs=25.0,
        gflops=tuple(zip(_DTYPES, (_CORES * clock * each for each in flops), strict=True)),
        shared_bytes=l2 * KIB,
        launch_us=5.0,
        fork_us=5.0,
        memory_bytes=64 * GIB,
        source=_CPU_SOURCE,
    )
