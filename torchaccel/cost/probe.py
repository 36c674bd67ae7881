"""How fast this machine does one thing right now: a clock, a reader of memory, matrix products."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call with its device work, in milliseconds; on CUDA between two events, with the L2 cache flushed."""
    if device.type == "cuda":
        return _timed_by_events(call, device)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _timed_by_events(call: Callable[[], object], device: torch.device) -> float:
    # What the call before left in L2 would be read for free; a buffer of twice its size takes its place.
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def best(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Milliseconds of the fastest of ``repeats`` calls after one that warms up."""
    timed(call, device)
    return min(timed(call, device) for _ in range(repeats))


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


def gemm_gflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """GFLOP/s of a square matrix product with edge ``size``; int8 products give int32."""
    if dtype == torch.int8:
        codes = torch.ones(size, size, dtype=dtype, device=device)
        call: Callable[[], object] = partial(torch._int_mm, codes, codes)
    else:
        values = torch.randn(size, size, device=device).to(dtype)
        call = partial(torch.mm, values, values)
    return 2.0 * size**3 / best(call, device) / 1e6


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body with one thread of torch's pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """The name the device's maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_bytes(device: torch.device, level: int | None = None) -> int:
    """Bytes of the last-level cache, or of ``level`` of a CPU's; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    found = {
        int((f / "level").read_text()): (f / "size").read_text().strip() for f in folders if (f / "size").is_file()
    }
    units = {"K": 2**10, "M": 2**20}
    sizes = {n: int(size[:-1]) * units[size[-1]] for n, size in found.items() if size[-1:] in units}
    return (sizes.get(level, 0) if level else 0) or max(sizes.values(), default=32 * 2**20)


def core_count() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: torch.device) -> int:
    """Bytes of the device's memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
