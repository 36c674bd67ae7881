"""The cache file: what is stored comes back, and whatever happens to the file is a warning and a miss."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.tuning.support import KEY, MACHINE, elsewhere, failure, timing
from torchaccel.errors import CacheWarning
from torchaccel.tuning import database
from torchaccel.tuning.cache import TuningCache, default_path
from torchaccel.tuning.record import Failure, Timing


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path / "deep" / "tuning.sqlite")


def aside(path: Path, kind: str) -> list[Path]:
    """Files that were moved aside."""
    return [p for p in path.parent.glob(f"{path.name}.{kind}-*") if not p.name.endswith(("-wal", "-shm"))]


def test_records_come_back_as_they_were(cache: TuningCache) -> None:
    assert cache.add(timing("cpp", 1.25), failure("triton"), timing("cpp", 2.5, elsewhere()))
    assert cache.of(KEY) == {"cpp": Timing(1.25, (1.25, 1.25), 1e-6), "triton": Failure("crashed", "SIGSEGV")}
    assert {record.key.fingerprint.device for record in cache.records()} == {"Some CPU", "Another CPU"}
    assert cache.records(MACHINE) == (timing("cpp", 1.25), failure("triton"))


def test_a_newer_result_takes_the_place_of_an_older_one(cache: TuningCache) -> None:
    cache.add(timing("cpp", 1.0))
    cache.add(timing("cpp", 2.0))
    assert cache.records() == (timing("cpp", 2.0),)


def test_a_candidate_that_ever_failed_has_failed(cache: TuningCache) -> None:
    cache.add(failure("cpp"))
    cache.add(timing("cpp", 1.0))
    assert isinstance(cache.of(KEY)["cpp"], Failure)


def test_no_file_is_a_miss_without_a_word_and_makes_no_file(cache: TuningCache) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.of(KEY) == {} and cache.facts(MACHINE) is None
    assert not cache.path.parent.exists()


def test_facts_come_back(cache: TuningCache) -> None:
    facts = {"dram_gbs": 45.5, "sources": {"dram_gbs": "measured"}}
    assert cache.add_facts(MACHINE, facts)
    assert cache.facts(MACHINE) == facts
    assert cache.facts(elsewhere().fingerprint) is None


def test_facts_that_were_changed_are_not_used(cache: TuningCache) -> None:
    cache.add_facts(MACHINE, {"dram_gbs": 45.5})
    execute(cache.path, "UPDATE facts SET facts = replace(facts, '45.5', '95.5')")
    assert cache.facts(MACHINE) is None


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE timings SET median_ms = 0.001",
        "UPDATE timings SET median_ms = -1",
        "UPDATE timings SET samples = '[]'",
        "UPDATE timings SET samples = 'what'",
        "UPDATE timings SET candidate = 'triton'",
        "UPDATE timings SET digest = ''",
        "UPDATE timings SET candidate = CAST(x'ff00ff' AS TEXT)",
        "UPDATE entries SET spec = replace(spec, 'float32', 'float16')",
        "UPDATE entries SET bucket = 'K=8,M=2,N=8'",
        "UPDATE entries SET units = 'two'",
    ],
)
def test_a_changed_row_is_not_used(cache: TuningCache, change: str) -> None:
    cache.add(timing("cpp"))
    assert len(cache.records()) == 1
    execute(cache.path, change)
    checked = cache.check()
    assert checked.records == () and len(checked.invalid) == 1
    assert cache.of(KEY) == {}


def test_prune_removes_invalid_rows_and_keeps_the_others(cache: TuningCache) -> None:
    cache.add(timing("cpp"), timing("triton"), failure("reference"))
    execute(cache.path, "UPDATE timings SET median_ms = 0.001 WHERE candidate = 'triton'")
    assert cache.remove(lambda record: False, invalid=True) == 1
    assert cache.check().invalid == ()
    assert {record.candidate for record in cache.records()} == {"cpp", "reference"}
    assert cache.remove(lambda record: record.candidate == "cpp") == 1
    assert {record.candidate for record in cache.records()} == {"reference"}


def test_garbage_is_moved_aside_and_kept(cache: TuningCache) -> None:
    cache.path.parent.mkdir()
    cache.path.write_bytes(b"this is not a database" * 100)
    with pytest.warns(CacheWarning, match="moved to"):
        assert cache.of(KEY) == {}
    assert aside(cache.path, "corrupt")[0].read_bytes().startswith(b"this is not a database")
    assert cache.add(timing()) and cache.of(KEY)


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.6, 0.9])
def test_a_truncated_file_never_raises_and_heals(cache: TuningCache, keep: float) -> None:
    cache.add(*[timing(f"cpp{{{i}}}") for i in range(300)])
    size = cache.path.stat().st_size
    for side in ("-wal", "-shm"):
        Path(f"{cache.path}{side}").unlink(missing_ok=True)
    os.truncate(cache.path, int(size * keep))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        found = cache.records()
        assert all(record == timing(record.candidate) for record in found)
        cache.add(timing("new"))
        cache.add(timing("new"))
    assert cache.of(KEY)["new"] == timing().outcome


def test_flipped_bytes_never_raise_and_never_lie(cache: TuningCache) -> None:
    import random

    cache.add(*[timing(f"cpp{{{i}}}", 1.0 + i) for i in range(50)])
    genuine = {f"cpp{{{i}}}": timing(f"cpp{{{i}}}", 1.0 + i) for i in range(50)}
    whole = cache.path.read_bytes()
    numbers = random.Random(0)
    damaged = 0
    for _ in range(60):
        for leftover in cache.path.parent.iterdir():
            leftover.unlink()
        content = bytearray(whole)
        for _ in range(20):
            content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        cache.path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = TuningCache(cache.path).records()
        damaged += len(found) < 50
        assert all(record == genuine[record.candidate] for record in found)
    assert damaged > 10


@pytest.mark.parametrize("found", ["0", "99", "soon"])
def test_another_format_is_a_warning_and_a_miss(cache: TuningCache, found: str) -> None:
    cache.add(timing())
    execute(cache.path, f"UPDATE meta SET value = '{found}'")
    with pytest.warns(CacheWarning, match="format"):
        assert cache.of(KEY) == {}


def test_an_older_file_is_kept_aside_when_something_is_stored(cache: TuningCache) -> None:
    cache.add(timing("old"))
    execute(cache.path, "UPDATE meta SET value = '0'")
    with pytest.warns(CacheWarning, match="format 0"):
        assert cache.add(timing("new"))
    assert set(cache.of(KEY)) == {"new"}
    assert len(aside(cache.path, "format")) == 1


def test_a_newer_file_is_left_alone(cache: TuningCache) -> None:
    cache.add(timing("newer"))
    execute(cache.path, "UPDATE meta SET value = '99'")
    before = cache.path.read_bytes()
    with pytest.warns(CacheWarning, match="format 99"):
        assert not cache.add(timing("old"))
    assert cache.path.read_bytes() == before and not aside(cache.path, "format")


def test_a_database_of_another_program_is_left_alone(cache: TuningCache) -> None:
    cache.path.parent.mkdir()
    execute(cache.path, "CREATE TABLE bookmarks (url TEXT)")
    with pytest.warns(CacheWarning, match="another program"):
        assert not cache.add(timing())
    assert not aside(cache.path, "corrupt")


def test_a_full_disk_is_a_warning_and_what_was_there_stays(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add(timing("first"))
    connect = sqlite3.connect

    def tiny(*args: object, **keywords: object) -> sqlite3.Connection:
        connection = connect(*args, **keywords)  # type: ignore[call-overload]
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(database.sqlite3, "connect", tiny)
    with pytest.warns(CacheWarning, match="full"):
        assert not cache.add(*[timing(f"cpp{{{i}}}") for i in range(300)])
    assert set(cache.of(KEY)) == {"first"}


def test_a_read_only_file_is_read_and_not_written() -> None:
    # Root may write anything, so the reader is another user, who must be able to get at the file.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        cache = TuningCache(folder / "tuning.sqlite")
        cache.add(timing("cpp"))
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        mine, theirs = multiprocessing.Pipe()
        reader = multiprocessing.get_context("fork").Process(target=read_and_write, args=(cache.path, theirs))
        reader.start()
        assert mine.poll(60)
        read, stored, warned = mine.recv()
        reader.join()
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
    assert read == ["cpp"] and stored is False
    assert "nothing new is remembered" in warned


def read_and_write(path: Path, answers: Connection) -> None:
    """As a user who may write nothing, look a key up and store a record."""
    if os.getuid() == 0:
        os.setuid(65534)
    cache = TuningCache(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = sorted(cache.of(KEY))
        stored = cache.add(timing("new"))
    answers.send((read, stored, " ".join(str(warning.message) for warning in caught)))


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TuningCache(tmp_path / "file" / "tuning.sqlite")
    with pytest.warns(CacheWarning):
        assert not cache.add(timing())
    assert cache.of(KEY) == {}


def test_a_warning_is_given_once(cache: TuningCache) -> None:
    cache.add(timing())
    execute(cache.path, "UPDATE meta SET value = '99'")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            cache.of(KEY)
    assert len(caught) == 1


def test_four_processes_at_once_lose_nothing(cache: TuningCache) -> None:
    cache.path.parent.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(str(cache.path), name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert {record.candidate for record in cache.records()} == {f"{name}{i}" for name in "abcd" for i in range(25)}
    assert cache.check().invalid == ()


def test_four_processes_that_find_garbage_move_it_aside_once(cache: TuningCache) -> None:
    cache.path.parent.mkdir()
    cache.path.write_bytes(b"garbage" * 1000)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(str(cache.path), name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(aside(cache.path, "corrupt")) == 1
    assert len(cache.records()) == 100


def write_many(path: str, name: str) -> None:
    """Store 25 records one by one; each must be stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = TuningCache(Path(path))
        assert all(cache.add(timing(f"{name}{i}")) for i in range(25))


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    assert default_path({"TORCHACCEL_CACHE": str(tmp_path / "x")}) == tmp_path / "x"
    assert default_path({}).name == "tuning.sqlite" and "torchaccel" in str(default_path({}))


def test_the_cache_needs_no_torch() -> None:
    program = "import sys, torchaccel.tuning.cache, torchaccel.tuning.exchange; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def execute(path: Path, statement: str) -> None:
    """Change a database behind the cache's back, and leave no write-ahead log."""
    for connection in opened(path):
        connection.execute(statement)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def opened(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path)
    yield connection
    connection.close()
