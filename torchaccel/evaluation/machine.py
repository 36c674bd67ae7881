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
    words = megabytes * 2**20 // 4
    source = torch.ones(words, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    halves = source.view(torch.get_num_threads() if words % torch.get_num_threads() == 0 else 1, -1)
    readers: list[Callable[[], Tensor]] = [source.sum, lambda: halves.sum(1), lambda: torch.dot(source, target)]
    target.copy_(source)
    read = max(_rate(readers[0], size, device), _rate(readers[1], size, device), _rate(readers[2], 2 * size, device))
    copy = _rate(lambda: target.copy_(source), 2 * size, device)
    return Machine(device_name(device), core_count(), read, copy, _gemm_rates(device, gemm_size))


def device_name(device: torch.device) -> str:
    """The name the device's maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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
