"""The commands and the options: what users type, and what they are told."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.tuning.support import elsewhere, failure, timing
from torchaccel.cli.app import app
from torchaccel.cli.tune import read_seconds, read_shapes
from torchaccel.errors import OptionsError
from torchaccel.options import resolve
from torchaccel.tuning import exchange
from torchaccel.tuning.cache import TuningCache

RECORDS = (timing("cpp", 1.25), failure("triton"), timing("cpp", 2.5, elsewhere()))


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    found = TuningCache(tmp_path / "tuning.sqlite")
    found.add(*RECORDS)
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_show_lists_results_and_prints_json(cache: TuningCache) -> None:
    shown = run("cache", "show", "--cache", cache.path)
    assert shown.exit_code == 0 and "1.250" in shown.stdout and "crashed" in shown.stdout
    assert str(cache.path) in shown.stdout.replace("\n", "") and "3 results" in shown.stdout
    found = exchange.from_text(run("cache", "show", "--json", "--cache", cache.path).stdout)
    assert set(found) == set(RECORDS)


def test_export_and_import_give_the_same_records(cache: TuningCache, tmp_path: Path) -> None:
    assert run("cache", "export", tmp_path / "out.json", "--cache", cache.path).exit_code == 0
    other = tmp_path / "other.sqlite"
    assert run("cache", "import", tmp_path / "out.json", "--cache", other).exit_code == 0
    assert set(TuningCache(other).records()) == set(RECORDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["records"][0]["timing"].update(median_ms=0.1), "digest"),
        (lambda found: found["records"][0]["key"].update(device="mine"), "digest"),
        (lambda found: found["records"][0].update(extra=1), "record 0"),
        (lambda found: found["records"].append("x"), "record 3"),
        (lambda found: found.update(format=9), "format 9"),
        (lambda found: found.pop("records"), "cache export"),
    ],
)
def test_an_export_that_was_changed_is_refused_as_a_whole(
    cache: TuningCache, tmp_path: Path, change: object, message: str
) -> None:
    found = json.loads(exchange.to_text(cache.records()))
    change(found)  # type: ignore[operator]
    (tmp_path / "out.json").write_text(json.dumps(found))
    other = tmp_path / "other.sqlite"
    answer = run("cache", "import", tmp_path / "out.json", "--cache", other)
    assert answer.exit_code == 2 and message in answer.output.replace("\n", " ")
    assert not other.exists()


def test_verify_names_damaged_rows(cache: TuningCache) -> None:
    assert run("cache", "verify", "--cache", cache.path).exit_code == 0
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE timings SET median_ms = 0.1 WHERE median_ms = 1.25")
    answer = run("cache", "verify", "--cache", cache.path)
    assert answer.exit_code == 1 and "linear" in answer.stdout and "2 valid results, 1 damaged" in answer.stdout
    assert run("cache", "prune", "--cache", cache.path).exit_code == 0
    assert run("cache", "verify", "--cache", cache.path).exit_code == 0


def test_prune_removes_what_is_named_and_nothing_else(cache: TuningCache) -> None:
    assert "0 results removed" in run("cache", "prune", "--cache", cache.path).stdout
    assert "1 results removed" in run("cache", "prune", "--failures", "--cache", cache.path).stdout
    assert set(cache.records()) == {RECORDS[0], RECORDS[2]}
    assert "2 results removed" in run("cache", "prune", "--foreign", "--cache", cache.path).stdout


def test_prune_by_age(cache: TuningCache) -> None:
    cache.add(timing("new", at=4e9))
    assert "3 results removed" in run("cache", "prune", "--older-than", 30, "--cache", cache.path).stdout
    assert [record.candidate for record in cache.records()] == ["new"]


def test_a_bundle_that_is_none_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no zip")
    answer = run("bundle", "verify", tmp_path / "file")
    assert answer.exit_code == 2 and "cannot be read as a bundle" in answer.output.replace("\n", " ")


def test_shapes_and_budgets_are_read() -> None:
    assert read_shapes("1x32768,8x4096") == [(1, 32768), (8, 4096)]
    assert [read_seconds(text) for text in ("120", "1.5s", "10min", "1h", "none")] == [120, 1.5, 600, 3600, None]


@pytest.mark.parametrize("text", ["", "1", "0x8", "1x", "1x8,", "axb", "1x-8"])
def test_other_shapes_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="1x32768"):
        read_shapes(text)


@pytest.mark.parametrize("text", ["", "soon", "10 parsecs", "-1"])
def test_other_budgets_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="120s"):
        read_seconds(text)


def test_options_of_tuning_are_typed() -> None:
    found = resolve({"cache": "/x/y", "tune": "quick", "bundle": Path("b"), "trust": True}, {})
    assert (found.cache, found.tune, found.bundle, found.trust) == (Path("/x/y"), "quick", Path("b"), True)
    assert found.requested() == {"cache": "/x/y", "tune": "quick", "bundle": "b", "trust": True}
    default = resolve({}, {})
    assert (default.cache, default.tune, default.bundle, default.trust) == (None, "none", None, False)
    assert default.requested() == {}
    assert resolve({}, {"TORCHACCEL_CACHE": "/z", "TORCHACCEL_TUNE": "full"}).tune == "full"


@pytest.mark.parametrize(
    "options", [{"tune": "heroic"}, {"cache": 3}, {"bundle": ""}, {"trust": "yes"}, {"tuned": "quick"}]
)
def test_impossible_options_are_errors(options: dict[str, object]) -> None:
    with pytest.raises(OptionsError):
        resolve(options, {})
