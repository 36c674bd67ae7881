"""Builds, checks and times the candidates of one task after the other; what the child process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from torchaccel.kernels import problem
from torchaccel.kernels.candidates import Candidate, Spec, spec_from_key

from .check import WrongResultError, check
from .clock import Clock
from .record import MAX_MESSAGE

MIN_ROUNDS = 3


class Workbench:
    """Answers the requests of ``worker`` with JSON values."""

    def __init__(self, build: Callable[[Any, Any], Callable[..., Any]]) -> None:
        self._build = build
        self._built: dict[str, Callable[..., Any]] = {}
        self._spec: Spec | None = None
        self._shape: dict[str, int] = {}
        self._device = torch.device("cpu")
        self._clock: Clock | None = None
        self._args: tuple[Any, ...] | None = None

    @torch.no_grad()
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if request["do"] == "task":
            return self._task(request)
        if request["do"] == "check":
            return self._check(request["candidate"], request["seed"])
        return self._time(request["candidates"], request["rounds"], request["enough"])

    def _task(self, request: dict[str, Any]) -> dict[str, Any]:
        self._args, self._clock = None, None
        self._built.clear()
        self._spec = spec_from_key(request["kernel"], request["spec"])
        self._shape, self._device = request["shape"], torch.device(request["device"])
        return {}

    def _check(self, candidate: str, seed: int) -> dict[str, Any]:
        assert self._spec is not None
        try:
            run = self._build(self._spec, Candidate.from_key(candidate))
        except Exception as error:
            return _failure("not compiled", error)
        try:
            largest = check(self._spec, run, self._shape, self._device, seed)
        except WrongResultError as wrong:
            return {"failure": "wrong", "message": str(wrong)[:MAX_MESSAGE]}
        except Exception as raised:
            return _failure("crashed", raised)
        self._built[candidate] = run
        return {"error": largest}

    def _time(self, names: list[str], rounds: int, enough: float) -> dict[str, Any]:
        """Interleaved samples of each, milliseconds, until ``rounds`` are done or ``enough`` seconds are spent."""
        assert self._spec is not None
        try:
            if self._args is None:
                self._args = problem.make(self._spec, self._shape, self._device, 0)
                self._clock = Clock(self._device)
            args, clock = self._args, self._clock
            assert clock is not None
            for name in names:
                clock.milliseconds(lambda name=name: self._run(name)(*args))  # type: ignore[misc]
            samples: dict[str, list[float]] = {name: [] for name in names}
            began = time.monotonic()
            for done in range(rounds):
                if done >= MIN_ROUNDS and time.monotonic() - began > enough:
                    break
                # Who goes first has no advantage over many rounds.
                for name in names if done % 2 else names[::-1]:
                    samples[name].append(clock.milliseconds(lambda name=name: self._run(name)(*args)))  # type: ignore[misc]
        except Exception as raised:
            return _failure("crashed", raised)
        return {"samples": samples}

    def _run(self, name: str) -> Callable[..., Any]:
        if name not in self._built:
            # Checked by an earlier process, which a later candidate brought down.
            assert self._spec is not None
            self._built[name] = self._build(self._spec, Candidate.from_key(name))
        return self._built[name]


def _failure(kind: str, error: Exception) -> dict[str, Any]:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    # A compiler's first line is its command; what is wrong stands where it says "error".
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return {"failure": kind, "message": f"{type(error).__name__}: {line.strip()}"[:MAX_MESSAGE]}
