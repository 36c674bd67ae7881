"""Bytes a call really allocates, transient ones included."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

BOUNDARY = "torchaccel::second_call"


def transient_peak(call: Callable[[], object], device: torch.device) -> int:
    """Largest number of tensor bytes that ``call`` held above what was allocated before it; calls it twice.

    On the CPU the allocator's events are replayed from a profile, on CUDA its own high-water mark is read. Memory that
    does not come from torch's allocator (a few kB inside kernels) is not seen. The second call is the one that counts:
    a profile does not see the release of what was allocated before it began, and what the second call releases, such
    as the cache it replaces, was allocated by the first.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _muted_stderr():
        recorded.start()
    try:
        call()
        with record_function(BOUNDARY):
            call()
    finally:
        with _muted_stderr():
            recorded.stop()
    # The events as recorded: the profile's own list folds an allocation into the operator that made it.
    recorder = recorded.profiler
    assert recorder is not None and recorder.kineto_results is not None
    events: list[Any] = sorted(recorder.kineto_results.events(), key=lambda event: event.start_ns())
    held = before = peak = 0
    for event in events:
        if event.name() == BOUNDARY:
            before = peak = held
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - before


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Drop what native code prints on stderr: the profiler announces its start and stop there."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
