"""Interleaved timing: order, ratios, failures, load."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from torchaccel.cost.probe import timed
from torchaccel.evaluation.timing import (
    LoadWatch,
    Spread,
    _own_cpu_seconds,
    interleave,
    require_quiet,
    speedups,
)


def test_every_variant_runs_once_a_round_in_rotating_order() -> None:
    order: list[str] = []

    def call(name: str) -> float:
        order.append(name)
        return 1.0

    samples, failures = interleave({name: partial(call, name) for name in "abc"}, 3)
    assert order == list("abcbcacab")
    assert samples == {name: [1.0] * 3 for name in "abc"}
    assert not failures


def test_a_failing_variant_leaves_the_others_their_samples() -> None:
    turns = iter(range(10))

    def breaks() -> float:
        if next(turns) == 1:
            raise RuntimeError("kernel missing")
        return 1.0

    samples, failures = interleave({"good": lambda: 2.0, "bad": breaks}, 4)
    assert samples == {"good": [2.0] * 4}
    assert str(failures["bad"]) == "kernel missing"


def test_speedups_are_medians_of_neighbouring_ratios() -> None:
    # The machine became ten times slower half-way: the ratio did not change.
    samples = {"fast": [1.0, 1.0, 10.0, 10.0], "slow": [3.0, 3.0, 30.0, 30.0]}
    assert speedups(samples, "fast") == {"slow": 3.0}
    assert speedups(samples, "slow") == {"fast": pytest.approx(1 / 3)}


def test_spread_and_its_json() -> None:
    assert Spread.of([3.0, 1.0, 2.0]).to_dict() == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}


def test_timed_measures_milliseconds() -> None:
    assert 9.0 < timed(lambda: time.sleep(0.01), torch.device("cpu")) < 500.0


def test_our_own_work_does_not_make_the_machine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 110.0])
    own = iter([0.0, 10.0])
    monkeypatch.setattr("torchaccel.evaluation.timing._machine_cpu_seconds", lambda: next(ticks))
    monkeypatch.setattr("torchaccel.evaluation.timing._own_cpu_seconds", lambda: next(own))
    watch = LoadWatch()
    with watch.watching():
        time.sleep(0.01)
    assert watch.result()["busy"] is False


def test_the_work_of_others_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 110.0])
    monkeypatch.setattr("torchaccel.evaluation.timing._machine_cpu_seconds", lambda: next(ticks))
    watch = LoadWatch()
    with watch.watching():
        time.sleep(0.01)
    assert watch.result()["busy"] is True


def test_a_living_child_is_not_another_process() -> None:
    busy = "import sys, time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE) as child:
        before = _own_cpu_seconds()
        deadline = time.monotonic() + 60
        while _own_cpu_seconds() - before < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _own_cpu_seconds() - before >= 0.3
        child.kill()


def test_a_quiet_machine_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchaccel.evaluation.timing.QUIET_SECONDS", 0.01)
    monkeypatch.setattr("torchaccel.evaluation.timing._machine_cpu_seconds", lambda: 5.0)
    require_quiet()
