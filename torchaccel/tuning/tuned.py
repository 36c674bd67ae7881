"""What the compiler asks: how long did this candidate take, the last time it was measured on this machine."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from torchaccel.cost.choose import GAIN
from torchaccel.cost.shape import LinearShape, Shape
from torchaccel.errors import CacheMissError, CacheWarning
from torchaccel.kernels.candidates import Candidate, Spec
from torchaccel.kernels.spec import AttentionSpec

from .cache import TuningCache, default_path, outcomes
from .fingerprint import Fingerprint, fingerprint
from .key import Key, bucket, nearest, parse_bucket
from .record import Failure, Record, Timing


class Tuned:
    """Timings and failures of this machine, read once; looked up by spec, shape and candidate.

    With ``assert_hit`` a spec that was not tuned raises ``CacheMissError`` with the fields in which the nearest entry
    differs. The number of stored tokens is no such field: a choice is made for every length, of which some were tuned.
    """

    def __init__(
        self, records: Iterable[Record], own: Fingerprint, *, assert_hit: bool = False, source: str = "the cache"
    ) -> None:
        self._records = tuple(records)
        self._own = own
        self._assert_hit = assert_hit
        self._source = source
        groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in self._records:
            if record.key.fingerprint == own:
                groups[record.key.spec, record.key.bucket].append(record)
        self._found = {name: outcomes(group) for name, group in groups.items()}
        self._tuned_specs = {(spec, _without_length(parse_bucket(text))) for spec, text in groups}

    @staticmethod
    def open(
        path: Path | None,
        device: torch.device,
        *,
        bundled: Iterable[Record] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Tuned:
        """What the cache at ``path`` (None: the default) knows, and behind it the records of a bundle.

        ``TORCHACCEL_ASSERT_CACHE_HIT=1`` turns misses into errors.
        """
        environment = os.environ if environment is None else environment
        own = fingerprint(device)
        assert_hit = environment.get("TORCHACCEL_ASSERT_CACHE_HIT", "0") not in ("", "0")
        cache = TuningCache(default_path(environment) if path is None else path)
        # The nearest entry may be another machine's; without the error nobody asks for those.
        checked = cache.check(None if assert_hit else own)
        if checked.invalid:
            warnings.warn(
                f"{cache.path} has {len(checked.invalid)} damaged rows, which are not used; "
                "see torchaccel cache verify, remove them with torchaccel cache prune",
                CacheWarning,
                stacklevel=2,
            )
        return Tuned((*bundled, *checked.records), own, assert_hit=assert_hit, source=str(cache.path))

    def __call__(self, spec: Spec, shape: Shape, candidate: Candidate) -> float | None:
        """Milliseconds of a candidate in the bucket of ``shape``; None when it failed or was never measured."""
        outcome = self._outcomes(spec, shape).get(candidate.key())
        return outcome.median_ms if isinstance(outcome, Timing) else None

    def failure(self, spec: Spec, shape: Shape, candidate: Candidate) -> Failure | None:
        """How a candidate failed, in which case it must not be chosen; None when it did not, as far as is known."""
        outcome = self._outcomes(spec, shape).get(candidate.key())
        return outcome if isinstance(outcome, Failure) else None

    def fastest(self, spec: Spec, shape: Mapping[str, int], choices: Sequence[Candidate]) -> Candidate:
        """The fastest of ``choices`` that was measured; the first that did not fail where none was.

        ``shape`` may lack S, where a choice is made for all lengths: what counts is the longest that was measured. Of
        candidates within 5 % the first is taken.
        """
        found = self._outcomes(spec, self._longest(spec, shape))
        able = [choice for choice in choices if not isinstance(found.get(choice.key()), Failure)] or list(choices)
        timings = {choice: found.get(choice.key()) for choice in able}
        measured = {choice: t.median_ms for choice, t in timings.items() if isinstance(t, Timing)}
        if not measured:
            return able[0]
        return next(choice for choice, ms in measured.items() if ms <= GAIN * min(measured.values()))

    def _longest(self, spec: Spec, shape: Mapping[str, int]) -> Mapping[str, int]:
        """``shape``, with the largest S among the entries of ``spec`` that are otherwise of its bucket."""
        mine = _without_length(parse_bucket(bucket(shape)))
        tuned = [parse_bucket(text) for key, text in self._found if key == spec.key()]
        lengths = [other["S"] for other in tuned if "S" in other and _without_length(other) == mine]
        return {**shape, "S": max(lengths)} if lengths else shape

    def _outcomes(self, spec: Spec, shape: Shape | Mapping[str, int]) -> Mapping[str, Timing | Failure]:
        of = shape if isinstance(shape, Mapping) else sizes(spec, shape)
        found = self._found.get((spec.key(), bucket(of)))
        if found is None and self._assert_hit:
            key = Key.of(spec, of, self._own)
            if (key.spec, _without_length(parse_bucket(key.bucket))) not in self._tuned_specs:
                raise CacheMissError(self._difference(key))
        return found or {}

    def _difference(self, key: Key) -> str:
        other = nearest(key, list(dict.fromkeys(record.key for record in self._records)))
        asked = f"TORCHACCEL_ASSERT_CACHE_HIT is set, and {self._source} has no entry for {key.kernel} {key.bucket}"
        if other is None:
            return f"{asked}; it is empty: run torchaccel tune"
        lines = "\n  ".join(line for line in key.differences(other) if not line.startswith("bucket.S:"))
        return f"{asked} {key.spec}\nThe nearest entry differs in\n  {lines}\nRun torchaccel tune for this one"


def _without_length(shape: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name, size in sorted(shape.items()) if name != "S")


def sizes(spec: Spec, shape: Shape) -> dict[str, int]:
    """The symbols of a key for a shape of the cost model."""
    if isinstance(shape, LinearShape):
        return {"M": shape.rows, "K": shape.inputs, "N": sum(shape.outputs)}
    found = {"B": shape.batch, "H_kv": shape.kv_heads, "S": shape.tokens}
    if isinstance(spec, AttentionSpec) and spec.phase == "decode":
        found["Q"] = shape.queries
    return found
