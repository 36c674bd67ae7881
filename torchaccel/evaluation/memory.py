"""Bytes a call really allocates, transient ones included."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile


def transient_peak(call: Callable[[], object], device: torch.device) -> int:
    """Largest number of tensor bytes that ``call`` held above what was allocated before it.

    On the CPU the allocator's events are replayed from a profile, on CUDA its own high-water mark is read. Memory that
    does not come from torch's allocator (a few kB inside kernels) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stdout(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # The events as recorded: the profile's own list folds an allocation into the operator that made it.
    recorder = recorded.profiler
    assert recorder is not None and recorder.kineto_results is not None
    events = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what native code prints on stdout to stderr: the profiler announces itself there."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
