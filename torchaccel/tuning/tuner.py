"""Measures candidates in a child process and writes down every result at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from torchaccel.errors import TuningError
from torchaccel.kernels import candidates as registry
from torchaccel.kernels.candidates import Candidate, Spec

from .cache import TuningCache
from .child import Child, Crashed, Hung
from .fingerprint import fingerprint
from .key import Key, parse_bucket, representative
from .record import Failure, Record, Timing
from .words import words

Effort = Literal["none", "quick", "full"]
WORKER = ("-m", "torchaccel.tuning.worker")
# Longer than any kernel takes to compile and to run a few times.
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """A spec to tune, at a shape.

    B, H_kv, Q, S for decode and select; B, H_kv, S for prefill; M, K, N for linear; M for fused.
    """

    spec: Spec
    shape: Mapping[str, int]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{registry.kernel_name(self.spec)} {sizes} ({words(self.spec)})"


@dataclass(frozen=True)
class Thoroughness:
    """candidates: how many of each task, the seed first; None for all. rounds and seconds: samples of each, at most."""

    candidates: int | None
    rounds: int
    seconds: float


EFFORTS: dict[str, Thoroughness] = {
    "none": Thoroughness(0, 0, 0.0),
    "quick": Thoroughness(4, 9, 1.0),
    "full": Thoroughness(None, 31, 6.0),
}


@dataclass
class Summary:
    """What a run of the tuner did.

    measured, failed: candidates timed and found unusable by this run. known: skipped, since the cache has them. left:
    not reached within the budget. stored: whether the cache kept everything. records: all that is known now about the
    tasks, failures included.
    """

    measured: int = 0
    failed: int = 0
    known: int = 0
    left: int = 0
    stored: bool = True
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)


class Progress(Protocol):
    """Told how far the work is."""

    def begin(self, steps: int) -> None:
        """There are ``steps`` candidates to measure."""

    def advance(self, doing: str) -> None:
        """The next one is begun: ``doing``."""


class Tuner:
    """Finds out how fast the candidates of tasks are, into a cache.

    Each is built, compared with the reference on fresh inputs and timed against the first usable one, sample by sample
    in turn, in a process of its own with a time limit: one that crashes or hangs costs a new process. What the cache
    already has is skipped, so a run that was interrupted goes on where it was.
    """

    def __init__(
        self,
        cache: TuningCache,
        device: torch.device,
        *,
        effort: Effort = "quick",
        budget: float | None = None,
        candidates: Callable[[Spec, str], Sequence[Candidate]] = registry.candidates,
        worker: Sequence[str] = WORKER,
        limit: float = LIMIT_SECONDS,
    ) -> None:
        """budget: seconds after which no further candidate is begun. limit: seconds a candidate may take.

        candidates(spec, device type) lists what is measured; worker: the interpreter's arguments of the child process.
        """
        if effort not in EFFORTS:
            raise ValueError(f"effort must be one of {', '.join(EFFORTS)}; found {effort!r}")
        self._cache = cache
        self._device = device
        self._how = EFFORTS[effort]
        self._budget = budget
        self._candidates = candidates
        self._worker = worker
        self._limit = limit
        self._child: Child | None = None
        self._working_on: Key | None = None

    def run(self, tasks: Sequence[Task], progress: Progress | None = None) -> Summary:
        """Measure what is missing; raises ``TuningError`` when the child process cannot be started."""
        began = time.monotonic()
        summary = Summary()
        work = [(task, self._key(task), self._selected(task)) for task in _distinct(tasks)]
        if progress is not None:
            progress.begin(sum(len(self._missing(key, selected)) for _, key, selected in work))
        try:
            for task, key, selected in work:
                mine: dict[str, Timing | Failure] = {}
                for candidate in selected:
                    # Read again each time: another process may be at the same task.
                    known = self._cache.of(key) | mine
                    if candidate.key() in known:
                        summary.known += 1
                    elif self._budget is not None and time.monotonic() - began > self._budget:
                        summary.left += 1
                    else:
                        if progress is not None:
                            progress.advance(f"{task} {candidate.key()}")
                        outcome = mine[candidate.key()] = self._measure(key, candidate, known)
                        summary.measured += isinstance(outcome, Timing)
                        summary.failed += isinstance(outcome, Failure)
                        record = Record(key, candidate.key(), outcome, time.time())
                        if not self._cache.add(record):
                            summary.stored = False
                            summary.records.append(record)
        finally:
            if self._child is not None:
                self._child.close()
                self._child = None
        keys = {key for _, key, _ in work}
        summary.records += [r for r in self._cache.records(fingerprint(self._device)) if r.key in keys]
        summary.seconds = time.monotonic() - began
        return summary

    def _missing(self, key: Key, selected: Sequence[Candidate]) -> list[Candidate]:
        known = self._cache.of(key)
        return [candidate for candidate in selected if candidate.key() not in known]

    def _key(self, task: Task) -> Key:
        return Key.of(task.spec, task.shape, fingerprint(self._device))

    def _selected(self, task: Task) -> Sequence[Candidate]:
        return self._candidates(task.spec, self._device.type)[: self._how.candidates]

    def _measure(self, key: Key, candidate: Candidate, known: Mapping[str, Timing | Failure]) -> Timing | Failure:
        name = candidate.key()
        answer = self._ask(key, {"do": "check", "candidate": name, "seed": time.time_ns() % 2**31})
        if isinstance(answer, Failure):
            return answer
        anchor = next((other for other, found in known.items() if isinstance(found, Timing)), None)
        names = [name] if anchor is None else [anchor, name]
        request = {"do": "time", "candidates": names, "rounds": self._how.rounds, "enough": self._how.seconds}
        timed = self._ask(key, request)
        if isinstance(timed, Failure):
            return timed
        samples = timed["samples"][name]
        if anchor is None:
            return Timing(statistics.median(samples), tuple(samples), answer["error"])
        # A machine that others share is faster at one time and slower at another. Ratios of neighbouring samples do not
        # notice, so the first usable candidate is the unit in which the others are measured.
        reference = known[anchor]
        assert isinstance(reference, Timing)
        ratio = statistics.median(a / b for a, b in zip(samples, timed["samples"][anchor], strict=True))
        return Timing(ratio * reference.median_ms, tuple(samples), answer["error"])

    def _ask(self, key: Key, request: Mapping[str, Any]) -> dict[str, Any] | Failure:
        """The child's answer, or what became of the candidate it is about."""
        child = self._started(key)
        try:
            answer = child.ask(request, self._limit)
        except Hung as error:
            return Failure("hung", str(error))
        except Crashed as error:
            return Failure("crashed", str(error))
        if "failure" in answer:
            return Failure(answer["failure"], answer["message"])
        return answer

    def _started(self, key: Key) -> Child:
        """A child that works on ``key``: the one that is there, or a new one."""
        if self._child is None or not self._child.alive:
            try:
                self._child = Child(self._worker)
            except (Hung, Crashed, OSError) as error:
                raise TuningError(
                    f"the process that measures does not start ({error}); try: python -m torchaccel.tuning.worker"
                ) from error
            self._working_on = None
        if self._working_on != key:
            task = {"do": "task", "kernel": key.kernel, "spec": key.spec, "shape": parse_bucket(key.bucket)}
            try:
                self._child.ask({**task, "device": str(self._device)}, self._limit)
            except (Hung, Crashed) as error:
                raise TuningError(
                    f"the process that measures kernels cannot read {key.kernel} {key.spec}: {error}"
                ) from error
            self._working_on = key
        return self._child


def _distinct(tasks: Sequence[Task]) -> Iterator[Task]:
    seen = set()
    for task in tasks:
        rounded = Task(task.spec, representative(task.shape))
        name = (rounded.spec, tuple(sorted(rounded.shape.items())))
        if name not in seen:
            seen.add(name)
            yield rounded
