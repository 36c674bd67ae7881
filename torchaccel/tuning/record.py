"""One result of tuning: a candidate that was timed, or one that failed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .key import Key

FailureKind = Literal["wrong", "crashed", "hung", "not compiled"]
FAILURE_KINDS: tuple[str, ...] = get_args(FailureKind)
MAX_MESSAGE = 500


@dataclass(frozen=True)
class Timing:
    """How long a candidate takes, after its results were found to agree with the reference.

    median_ms: milliseconds of a call. samples: the single calls, milliseconds. error: largest distance from the
    reference over the largest value of the reference, as found by the check.
    """

    median_ms: float
    samples: tuple[float, ...]
    error: float


@dataclass(frozen=True)
class Failure:
    """Why a candidate cannot be used: "wrong", "crashed", "hung" or "not compiled", and a line that says more."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Record:
    """What was found out about a candidate (``Candidate.key()``) under a key, and when (seconds since 1970)."""

    key: Key
    candidate: str
    outcome: Timing | Failure
    at: float

    def to_dict(self) -> dict[str, object]:
        """The record as JSON values: the key's fields, and those of a timing or a failure."""
        kind = "timing" if isinstance(self.outcome, Timing) else "failure"
        outcome = asdict(self.outcome)
        if isinstance(self.outcome, Timing):
            outcome["samples"] = list(self.outcome.samples)
        return {"key": self.key.to_dict(), "candidate": self.candidate, "at": self.at, kind: outcome}

    @staticmethod
    def from_dict(found: object) -> Record:
        """The record whose ``to_dict()`` is ``found``; ``ValueError`` that names what is wrong for anything else."""
        if not isinstance(found, Mapping) or not isinstance(found.get("key"), Mapping):
            raise ValueError("a record is an object with a key")
        if set(found) not in ({"key", "candidate", "at", "timing"}, {"key", "candidate", "at", "failure"}):
            raise ValueError(f"a record has key, candidate, at, and timing or failure; found {sorted(found)}")
        candidate, at = found["candidate"], found["at"]
        if not isinstance(candidate, str) or not candidate:
            raise ValueError(f"a candidate is a text; found {candidate!r}")
        outcome = _timing(found["timing"]) if "timing" in found else _failure(found["failure"])
        return Record(Key.from_dict(found["key"]), candidate, outcome, _positive("at", at))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of everything in the record, in hexadecimal."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _timing(found: object) -> Timing:
    if not isinstance(found, Mapping) or set(found) != {"median_ms", "samples", "error"}:
        raise ValueError(f"a timing has median_ms, samples and error; found {found!r}")
    samples = found["samples"]
    if not isinstance(samples, list) or not samples:
        raise ValueError("a timing has samples")
    error = found["error"]
    if type(error) not in (int, float) or not math.isfinite(error) or error < 0:
        raise ValueError(f"the error of a timing cannot be {error!r}")
    return Timing(
        _positive("median_ms", found["median_ms"]), tuple(_positive("samples", s) for s in samples), float(error)
    )


def _failure(found: object) -> Failure:
    if not isinstance(found, Mapping) or set(found) != {"kind", "message"}:
        raise ValueError(f"a failure has kind and message; found {found!r}")
    if found["kind"] not in FAILURE_KINDS or not isinstance(found["message"], str):
        raise ValueError(f"a failure is one of {', '.join(FAILURE_KINDS)} with a message; found {found!r}")
    return Failure(found["kind"], found["message"])


def _positive(name: str, value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} must be a positive number; found {value!r}")
    return float(value)  # type: ignore[arg-type]
