"""What this machine can do, measured: bandwidths, GEMM rates, cores, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .timing import timed

REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device: bandwidths in GB/s, dense GEMM in GFLOP/s by dtype name."""

    device: str
    cores: int
    read_gbs: float
    copy_gbs: float
    gemm_gflops: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values, rounded to what a repetition would confirm."""
        return {
            "device": self.device,
            "cores": self.cores,
            "read_gbs": round(self.read_gbs, 2),
            "copy_gbs": round(self.copy_gbs, 2),
            "gemm_gflops": {name: round(rate, 1) for name, rate in self.gemm_gflops.items()},
        }


def measure_machine(device: torch.device, *, megabytes: int = 512, gemm_size: int = 2048) -> Machine:
    """Measure ``device`` in a few seconds; every rate is the best of several, since a floor needs the fastest.

    ``megabytes`` should be well above the caches, ``gemm_size`` is the edge of the square GEMMs.
    """
    probe = ReadProbe(device, megabytes)
    read = max(probe.gbs() for _ in range(REPEATS))
    target = torch.empty_like(probe.source)
    copy = _rate(lambda: target.copy_(probe.source), 2 * probe.size, device)
    return Machine(device_name(device), core_count(), read, copy, _gemm_rates(device, gemm_size))


class ReadProbe:
    """Reads memory well above the caches and tells how fast it was just now.

    A virtual machine shares its memory bus with strangers: on one such machine 75 and 37 GB/s were seen 20 s apart. A
    floor therefore needs the rate of the moments in which the samples were taken.
    """

    def __init__(self, device: torch.device, megabytes: int) -> None:
        self.source = torch.ones(megabytes * 2**20 // 8, 2, device=device).view(-1)
        self.size = self.source.numel() * self.source.element_size()
        self._device = device
        parts = self.source.view(2, -1)
        self._readers: list[Callable[[], Tensor]] = [self.source.sum, lambda: parts.sum(1), lambda: torch.dot(*parts)]

    def gbs(self) -> float:
        """Read bandwidth in GB/s, of the best of a few ways to read."""
        return self.size / min(timed(read, self._device) for read in self._readers) / 1e6


def device_name(device: torch.device) -> str:
    """The name the device's maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache, 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)


def core_count() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """Versions of what took part; None for what is not installed."""
    names = ("torchaccel", "torch", "triton", "transformers")
    found: dict[str, str | None] = {name: _version(name) for name in names}
    return found | {"python": platform.python_version(), "compiler": compiler()}


def compiler() -> str | None:
    """First line of the C++ compiler's version, or None where there is no compiler."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0] if answer.stdout else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _rate(call: Callable[[], object], amount: float, device: torch.device) -> float:
    """``amount`` per call as 1e9 per second, the best of some repetitions after one warm-up."""
    timed(call, device)
    return amount / min(timed(call, device) for _ in range(REPEATS)) / 1e6


def _gemm_rates(device: torch.device, size: int) -> dict[str, float]:
    flops = 2.0 * size**3
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        rates[str(dtype).removeprefix("torch.")] = _rate(partial(torch.mm, a, a), flops, device)
    return rates
