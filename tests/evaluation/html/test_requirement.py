"""Without matplotlib a report is refused before anything is measured, and results are never lost to one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from torchaccel.cli.app import app
from torchaccel.evaluation import bench
from torchaccel.evaluation.html import page

from . import samples


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Benchmarks return a sample at once; the list grows by one for each that was started."""
    started: list[str] = []

    def run_bench(*arguments: Any, **settings: Any) -> dict[str, Any]:
        started.append("bench")
        return samples.null_document() | {"machine": {"busy": False}, "model": {"name": "tiny"}, "results": []}

    monkeypatch.setattr(bench, "run_bench", run_bench)
    monkeypatch.setattr("torchaccel.evaluation.tables.results_table", lambda found: "table")
    return started


def invoke(tmp_path: Path, html: Path) -> Any:
    return CliRunner().invoke(app, ["bench", "decode", "--json", str(tmp_path / "doc.json"), "--html", str(html)])


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke(tmp_path, tmp_path / "page.html")
    assert done.exit_code == 2
    assert 'pip install "torchaccel[report]"' in " ".join(done.stderr.split())
    assert measured == []


def test_a_folder_that_is_missing_is_found_out_before_measuring(tmp_path: Path, measured: list[str]) -> None:
    done = invoke(tmp_path, tmp_path / "no" / "page.html")
    assert done.exit_code == 2
    assert "there is no folder" in " ".join(done.stderr.split())
    assert measured == []


def test_a_report_stands_beside_the_document(tmp_path: Path, measured: list[str]) -> None:
    done = invoke(tmp_path, tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert measured == ["bench"]
    assert "séance" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_document_outlives_a_report_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(page, "write_report", broken)
    assert invoke(tmp_path, tmp_path / "page.html").exit_code == 1
    assert json.loads((tmp_path / "doc.json").read_text())["case"]["kind"] == "séance"
