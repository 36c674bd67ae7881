"""What this machine can do, measured: bandwidths, GEMM rates, cores, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from ..cost.probe import ReadProbe, best, core_count, device_name, gemm_gflops
from ..kernels.spec import DTYPES

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
    copy = 2 * probe.size / best(lambda: target.copy_(probe.source), device) / 1e6
    rates = {name: gemm_gflops(device, DTYPES[name], gemm_size) for name in ("float32", "bfloat16")}
    return Machine(device_name(device), core_count(), read, copy, rates)


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
