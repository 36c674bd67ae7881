"""The tuner: what is right is timed, what is not is recorded, and nothing that happens to it loses results."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchaccel.kernels.candidates import Candidate

from tests.tuning.support import (
    BROKEN,
    CRASHING,
    DECODE,
    EXITING,
    GOOD,
    HANGING,
    HERE,
    LINEAR,
    NAN,
    SHAPE,
    SLOW,
    WRONG,
    timing,
)
from torchaccel.errors import TuningError
from torchaccel.tuning.cache import TuningCache
from torchaccel.tuning.fingerprint import fingerprint
from torchaccel.tuning.key import Key
from torchaccel.tuning.record import Failure, Record, Timing
from torchaccel.tuning.tuner import Task, Tuner

CPU = torch.device("cpu")
WORKER = (str(HERE / "fake_worker.py"),)
TASK = Task(LINEAR, SHAPE)
TASKS = [Task(LINEAR, {**SHAPE, "M": rows}) for rows in (3, 4)]
EVERYTHING = (BROKEN, GOOD, WRONG, CRASHING, NAN, HANGING, EXITING, SLOW)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The child processes find the packages that this one found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path / "tuning.sqlite")


def tuner(cache: TuningCache, *candidates: Candidate, **changes: Any) -> Tuner:
    """A tuner of these candidates, with the worker whose candidates may be faulty."""

    def listed(spec: object, device: str) -> Sequence[Candidate]:
        return candidates

    return Tuner(cache, CPU, **{"effort": "full", "candidates": listed, "worker": WORKER, **changes})


def by_candidate(records: Sequence[Record]) -> dict[str, Timing | Failure]:
    return {record.candidate: record.outcome for record in records}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TuningCache:
    """What one run makes of candidates of every kind, the good ones in between, for two shapes of one bucket."""
    cache = TuningCache(tmp_path_factory.mktemp("tuned") / "tuning.sqlite")
    summary = tuner(cache, *EVERYTHING, limit=12.0).run(TASKS)
    assert (summary.measured, summary.failed, summary.known, summary.stored) == (2, 6, 0, True)
    return cache


@pytest.fixture
def everything(tuned: TuningCache) -> dict[str, Timing | Failure]:
    return by_candidate(tuned.records())


@pytest.mark.parametrize(
    ("candidate", "kind", "message"),
    [
        (BROKEN, "not compiled", "expected ';'"),
        (WRONG, "wrong", "is off by"),
        (NAN, "wrong", "not finite"),
        (CRASHING, "crashed", "SIGSEGV"),
        (HANGING, "hung", "no answer within 12 s"),
        (EXITING, "crashed", "the kernel gave up"),
    ],
)
def test_a_bad_candidate_is_recorded_with_its_reason(
    everything: dict[str, Timing | Failure], candidate: Candidate, kind: str, message: str
) -> None:
    found = everything[candidate.key()]
    assert isinstance(found, Failure)
    assert found.kind == kind and message in found.message


def test_good_candidates_are_timed_whatever_the_others_do(everything: dict[str, Timing | Failure]) -> None:
    good, slow = everything[GOOD.key()], everything[SLOW.key()]
    assert isinstance(good, Timing) and isinstance(slow, Timing)
    assert good.median_ms < slow.median_ms and min(slow.samples) >= 20
    assert len(good.samples) >= 3 and good.error <= 1e-4


def test_a_second_run_measures_nothing_again(tuned: TuningCache) -> None:
    records = tuned.records()
    # It does not even start the process that measures.
    again = tuner(tuned, *EVERYTHING, worker=("-c", "raise SystemExit(1)")).run(TASKS)
    assert (again.measured, again.failed, again.known) == (0, 0, len(EVERYTHING))
    assert tuned.records() == records and set(again.records) == set(records)


def test_tasks_of_one_bucket_are_measured_once_at_its_size(tuned: TuningCache) -> None:
    assert {record.key.bucket for record in tuned.records()} == {"K=8,M=4,N=8"}


class Steps:
    """Progress that remembers how much there is to do, and what was done."""

    def __init__(self) -> None:
        self.steps = 0
        self.done: list[str] = []

    def begin(self, steps: int) -> None:
        self.steps = steps

    def advance(self, doing: str) -> None:
        self.done.append(doing)


@pytest.mark.parametrize(("effort", "count"), [("none", 0), ("quick", 4), ("full", 6)])
def test_effort_says_how_many_candidates(cache: TuningCache, effort: str, count: int) -> None:
    pauses = [Candidate("composed", (("pause_ms", pause),)) for pause in range(6)]
    steps = Steps()
    summary = tuner(cache, *pauses, effort=effort, budget=-1.0).run([TASK], steps)
    # The budget is spent before the first: none is begun.
    assert (summary.measured, summary.left, steps.steps, steps.done) == (0, count, count, [])
    key = Key.of(LINEAR, SHAPE, fingerprint(CPU))
    cache.add(*(timing(pause.key(), key=key) for pause in pauses[:count]))
    again = tuner(cache, *pauses, effort=effort, budget=-1.0).run([TASK], steps)
    assert (again.known, again.left, steps.steps) == (count, 0, 0)


def test_progress_names_what_is_being_measured(cache: TuningCache) -> None:
    steps = Steps()
    tuner(cache, BROKEN, GOOD).run([TASK], steps)
    names = [BROKEN.key(), GOOD.key()]
    assert steps.steps == 2 and steps.done == [f"linear M=1 K=8 N=8 (float32) {name}" for name in names]


def test_an_unknown_effort_is_named(cache: TuningCache) -> None:
    with pytest.raises(ValueError, match="none, quick, full"):
        tuner(cache, GOOD, effort="heroic")


def test_results_survive_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning):
        summary = tuner(TuningCache(tmp_path / "file" / "tuning.sqlite"), GOOD).run([TASK])
    assert not summary.stored
    assert isinstance(by_candidate(summary.records)[GOOD.key()], Timing)


def test_a_worker_that_does_not_start_is_an_error_that_says_so(cache: TuningCache) -> None:
    with pytest.raises(TuningError, match="does not start"):
        tuner(cache, GOOD, worker=("-c", "raise SystemExit('no such thing')")).run([TASK])


def test_attention_is_tuned_with_the_projects_own_candidates(cache: TuningCache) -> None:
    def listed(spec: object, device: str) -> Sequence[Candidate]:
        return Candidate("composed"), Candidate("reference")

    shape = {"B": 2, "H_kv": 2, "Q": 1, "S": 100}
    summary = Tuner(cache, CPU, candidates=listed).run([Task(DECODE, shape)])
    found = cache.of(Key.of(DECODE, shape, fingerprint(CPU)))
    assert summary.measured == 2 and set(found) == {"composed", "reference"}


RUN = """
import sys
import torch
from pathlib import Path
from tests.tuning.support import HERE, LINEAR, SHAPE, GOOD
from torchaccel.kernels.candidates import Candidate
from torchaccel.tuning.cache import TuningCache
from torchaccel.tuning.tuner import Task, Tuner
listed = [Candidate("composed", (("pause_ms", pause),)) for pause in range(200)]
tuner = Tuner(TuningCache(Path(sys.argv[1])), torch.device("cpu"), effort="full",
              candidates=lambda spec, device: listed, worker=(str(HERE / "fake_worker.py"),))
print("running", flush=True)
tuner.run([Task(LINEAR, SHAPE)])
"""


def test_a_killed_tuner_keeps_what_it_had_and_leaves_no_process(cache: TuningCache) -> None:
    numbers = random.Random(1)
    found: set[Record] = set()
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(cache.path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        wait_for(partial(has_more_than, cache, len(found)))
        time.sleep(numbers.random() / 3)
        children = child_processes(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checked = cache.check()
        assert checked.invalid == ()
        # Everything that was known is known still, and not measured again.
        assert found < set(checked.records)
        found = set(checked.records)
        assert children
        wait_for(partial(none_is_left, children))


def has_more_than(cache: TuningCache, count: int) -> bool:
    return len(cache.records()) > count


def none_is_left(processes: Sequence[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in processes)


def child_processes(parent: int) -> list[int]:
    """Process ids of the children of a process."""
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for path in tasks for pid in path.read_text().split()]


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Return when ``condition()`` holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
