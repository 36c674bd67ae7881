"""Keys and lookups: what is measured is found, nothing else is, and a miss can be an error that explains itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchaccel.kernels.candidates import Candidate

from tests.tuning.support import DECODE, KEY, LINEAR, MACHINE, SHAPE, elsewhere, failure, timing
from torchaccel.cost.shape import AttentionShape, LinearShape
from torchaccel.errors import CacheMissError, CacheWarning
from torchaccel.tuning.cache import TuningCache
from torchaccel.tuning.fingerprint import Fingerprint, fingerprint
from torchaccel.tuning.key import Key, bucket, nearest, parse_bucket, representative
from torchaccel.tuning.tuned import Tuned

CPP, TRITON = Candidate("cpp"), Candidate("triton")
ONE = LinearShape(1, 8, (8,))


def test_sizes_of_one_bucket_share_a_key() -> None:
    assert bucket({"S": 3000, "B": 3, "H_kv": 5, "Q": 1}) == "B=4,H_kv=5,Q=1,S=4096"
    assert representative({"S": 4096, "K": 100}) == {"S": 4096, "K": 100}
    assert parse_bucket("B=4,S=4096") == {"B": 4, "S": 4096}


@pytest.mark.parametrize("text", ["B=3", "S=8,B=4", "B", "B=x", "B=-4", ""])
def test_other_texts_are_no_buckets(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bucket(text)


def test_a_shape_without_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="S=0"):
        bucket({"S": 0})


@pytest.mark.parametrize("field", list(MACHINE.to_dict()))
def test_every_field_of_the_fingerprint_counts(field: str) -> None:
    value = 99 if field == "units" else "something else"
    other = replace(MACHINE, **{field: value})  # type: ignore[arg-type]
    assert Tuned([timing()], other)(LINEAR, ONE, CPP) is None
    assert MACHINE.differences(other) == [f"{field}: {MACHINE.to_dict()[field]!r} here, {value!r} there"]
    assert Fingerprint.from_dict(other.to_dict()) == other


def test_timings_and_failures_are_found_by_spec_shape_and_candidate() -> None:
    tuned = Tuned([timing("cpp", 1.5), failure("triton"), timing("composed", 9.0, elsewhere())], MACHINE)
    assert tuned(LINEAR, ONE, CPP) == 1.5 and tuned.failure(LINEAR, ONE, CPP) is None
    found = tuned.failure(LINEAR, ONE, TRITON)
    assert found is not None and found.kind == "crashed" and tuned(LINEAR, ONE, TRITON) is None
    assert tuned(LINEAR, ONE, Candidate("composed")) is None
    assert tuned(LINEAR, LinearShape(2, 8, (8,)), CPP) is None
    assert tuned(replace(LINEAR, bias=True), ONE, CPP) is None
    assert tuned(LINEAR, ONE, Candidate("cpp", (("split", "stream"),))) is None


def test_several_weights_count_together() -> None:
    assert Tuned([timing()], MACHINE)(LINEAR, LinearShape(1, 8, (5, 3)), CPP) == 1.5


def test_attention_is_found_in_its_bucket() -> None:
    key = Key.of(DECODE, {"B": 1, "H_kv": 4, "Q": 1, "S": 4096}, MACHINE)
    tuned = Tuned([timing(key=key)], MACHINE)
    assert tuned(DECODE, AttentionShape(1, 4, 1, 3000), CPP) == 1.5
    assert tuned(DECODE, AttentionShape(1, 4, 1, 2048), CPP) is None
    assert tuned(DECODE, AttentionShape(1, 4, 2, 3000), CPP) is None


def test_a_miss_is_an_error_when_hits_are_asserted() -> None:
    key = Key.of(DECODE, {"B": 1, "H_kv": 4, "Q": 1, "S": 4096}, MACHINE)
    tuned = Tuned([timing(key=key), timing()], MACHINE, assert_hit=True)
    # Of the lengths a choice is made for, some were tuned.
    assert tuned(DECODE, AttentionShape(1, 4, 1, 64), CPP) is None
    with pytest.raises(CacheMissError) as caught:
        tuned(replace(DECODE, softcap=5.0), AttentionShape(2, 4, 1, 4096), CPP)
    message = str(caught.value)
    assert "spec.softcap: asked 5.0, found None" in message and "bucket.B: asked 2, found 1" in message
    assert "head_dim:" not in message and "torchaccel tune" in message


def test_a_miss_names_the_other_machine() -> None:
    with pytest.raises(CacheMissError, match="device: asked 'Some CPU', found 'Another CPU'"):
        Tuned([timing(key=elsewhere())], MACHINE, assert_hit=True)(LINEAR, ONE, CPP)
    with pytest.raises(CacheMissError, match="it is empty"):
        Tuned([], MACHINE, assert_hit=True)(LINEAR, ONE, CPP)


def test_the_nearest_entry_is_of_the_same_kernel() -> None:
    other = Key.of(DECODE, {"B": 1, "H_kv": 4, "Q": 1, "S": 4096}, MACHINE)
    assert nearest(KEY, [other, elsewhere()]) == elsewhere()
    assert nearest(KEY, []) is None


def test_opening_reads_the_cache_and_the_variable(tmp_path: Path) -> None:
    own = fingerprint(torch.device("cpu"))
    key = Key.of(LINEAR, SHAPE, own)
    cache = TuningCache(tmp_path / "tuning.sqlite")
    cache.add(timing("cpp", 1.5, key))
    tuned = Tuned.open(cache.path, torch.device("cpu"), environment={})
    assert tuned(LINEAR, ONE, CPP) == 1.5
    assert tuned(replace(LINEAR, bias=True), ONE, CPP) is None
    strict = Tuned.open(None, torch.device("cpu"), environment=asserting(cache.path))
    assert strict(LINEAR, ONE, CPP) == 1.5
    with pytest.raises(CacheMissError, match=r"spec\.bias: asked True, found False"):
        strict(replace(LINEAR, bias=True), ONE, CPP)


def test_what_this_machine_measured_counts_more_than_a_bundle(tmp_path: Path) -> None:
    key = Key.of(LINEAR, SHAPE, fingerprint(torch.device("cpu")))
    cache = TuningCache(tmp_path / "tuning.sqlite")
    cache.add(timing("cpp", 1.5, key))
    brought = [timing("cpp", 9.0, key), timing("triton", 3.0, key)]
    tuned = Tuned.open(cache.path, torch.device("cpu"), bundled=brought, environment={})
    assert tuned(LINEAR, ONE, CPP) == 1.5 and tuned(LINEAR, ONE, TRITON) == 3.0


def test_damaged_rows_are_said_once_and_not_used(tmp_path: Path) -> None:
    import sqlite3

    key = Key.of(LINEAR, SHAPE, fingerprint(torch.device("cpu")))
    cache = TuningCache(tmp_path / "tuning.sqlite")
    cache.add(timing("cpp", 1.5, key), timing("composed", 2.5, key))
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE timings SET median_ms = 0.1 WHERE candidate = 'cpp'")
    with pytest.warns(CacheWarning, match="1 damaged"):
        tuned = Tuned.open(cache.path, torch.device("cpu"), environment={})
    assert tuned(LINEAR, ONE, CPP) is None and tuned(LINEAR, ONE, Candidate("composed")) == 2.5


def asserting(path: Path) -> dict[str, str]:
    return {"TORCHACCEL_CACHE": str(path), "TORCHACCEL_ASSERT_CACHE_HIT": "1"}
