"""Timing variants against each other: interleaved in one run, medians, and ratios of neighbouring samples."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUSY_CORES = 0.25
QUIET_SECONDS = 1.0


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of ``n`` samples, in milliseconds."""

    median: float
    min: float
    max: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        return Spread(statistics.median(samples), min(samples), max(samples), len(samples))

    def to_dict(self) -> dict[str, float | int]:
        """The four numbers, milliseconds to a tenth of a microsecond."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def interleave(
    calls: Mapping[str, Callable[[], float]], rounds: int, on_round: Callable[[], None] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Call every variant once a round and collect the samples they return; the order rotates from round to round.

    Samples with the same index were taken next to each other, so their ratio is free of slow drifts of the machine.
    Returns the samples of the variants that survived and, for the others, the exception that ended them.
    """
    samples: dict[str, list[float]] = {label: [] for label in calls}
    failures: dict[str, Exception] = {}
    for turn in range(rounds):
        alive = [label for label in calls if label not in failures]
        start = turn % len(alive) if alive else 0
        for label in alive[start:] + alive[:start]:
            try:
                samples[label].append(calls[label]())
            except Exception as error:  # one variant's failure must not cost the others their samples
                failures[label] = error
                del samples[label]
        on_round()
    return samples, failures


def speedups(samples: Mapping[str, Sequence[float]], label: str) -> dict[str, float]:
    """How many times faster ``label`` is than each other variant: the median of the ratios round by round."""
    own = samples[label]
    return {
        other: statistics.median(theirs / mine for theirs, mine in zip(values, own, strict=True))
        for other, values in samples.items()
        if other != label
    }


class LoadWatch:
    """Tells whether other processes used the machine while samples were taken.

    The load average remembers our own compilation, so the share of other processes comes from the kernel's CPU counters
    minus the CPU time of this process and its children, over the timed part only; without such counters the load
    average at the start decides.
    """

    def __init__(self) -> None:
        self.before = _load_average()
        self.others = 0.0
        self._elapsed = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what other processes use while the body runs."""
        start, own, machine = time.perf_counter(), _own_cpu_seconds(), _machine_cpu_seconds()
        try:
            yield
        finally:
            used = _machine_cpu_seconds()
            if machine is not None and used is not None:
                self.others += (used - machine) - (_own_cpu_seconds() - own)
                self._elapsed += time.perf_counter() - start

    @property
    def cores(self) -> float:
        """Cores that other processes kept busy."""
        return self.others / self._elapsed if self._elapsed else self.before or 0.0

    def result(self) -> dict[str, Any]:
        """``load_before``, ``load_after`` (null where unknown) and ``busy``, as the results document names them."""
        return {"load_before": self.before, "load_after": _load_average(), "busy": self.cores > BUSY_CORES}


def require_quiet() -> None:
    """Raise ``RuntimeError`` when other processes use the machine; looks on for a second."""
    watch = LoadWatch()
    with watch.watching():
        time.sleep(QUIET_SECONDS)
    if watch.cores > BUSY_CORES:
        load = "unknown" if watch.before is None else f"{watch.before:.2f}"
        raise RuntimeError(
            f"--require-quiet was asked for, and other processes keep {watch.cores:.2f} cores busy where {BUSY_CORES} "
            f"are tolerated (load average {load}); stop them, or measure without it and have the result marked as busy"
        )


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _own_cpu_seconds() -> float:
    """CPU time of this process, of its children that ended and of its descendants that are alive."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system + _descendants_cpu_seconds()


def _descendants_cpu_seconds() -> float:
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # Behind the name, which may hold blanks: state, parent, ... and CPU times, of its ended children too.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(int(x) for x in fields[11:15])
    return sum(ticks[pid] for pid in ticks if _descends(pid, parents)) / os.sysconf("SC_CLK_TCK")


def _descends(pid: int, parents: Mapping[int, int]) -> bool:
    own = os.getpid()
    while pid in parents and pid != own:
        pid = parents[pid]
        if pid == own:
            return True
    return False


def _machine_cpu_seconds() -> float | None:
    counters = Path("/proc/stat")
    if not counters.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq = (int(x) for x in counters.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
