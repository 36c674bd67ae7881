"""Times single calls with cold caches, as they are when every layer of a model has run in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

MAX_SCRUB = 2**28
DEFAULT_CACHE = 2**25


class Clock:
    """Milliseconds of a call on a device; before each the last-level cache is filled with other data."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = min(2 * _cache_bytes(device), MAX_SCRUB)
        self._scrub = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """One call."""
        self._scrub.add_(1)
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return max(float(begin.elapsed_time(end)), 1e-6)
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in found if size[-1:] in units), default=DEFAULT_CACHE)
