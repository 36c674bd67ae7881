"""Tables for the eye."""

from __future__ import annotations

from rich.console import Console

from torchaccel.evaluation.results import Result, document
from torchaccel.evaluation.tables import notes, results_table
from torchaccel.evaluation.timing import Spread


def example() -> dict:  # type: ignore[type-arg]
    slow = Result("eager", {}, ms=Spread.of([8.0]), speedup={"torchaccel:exact": 0.25}, kv_bytes=2_000_000)
    fast = Result("torchaccel:exact", {}, ms=Spread.of([2.0]), speedup={"eager": 4.0}, bound_ms=1.0, graphs=2)
    broken = Result("torchaccel:int8", {})
    broken.fail(RuntimeError("no compiler"))
    case = {"kind": "decode", "context": 64, "batch": 1}
    machine = {"busy": True, "load_before": 1.5, "load_after": None}
    return document(
        command=[], versions={}, machine=machine, model={"name": "tiny"}, case=case, results=[slow, fast, broken]
    )


def test_speedups_have_a_column_per_baseline_and_unknowns_a_dash() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(results_table(example()))
    rows = {line.split()[0]: line.split()[1:] for line in shown.get().splitlines() if line.strip()}
    assert rows["eager"] == ["8.00", "-", "-", "2.0", "-", "-", "-"]
    assert rows["exact"] == ["2.00", "4.00", "0.50", "-", "-", "2", "-"]
    assert "tiny, decode, context 64, batch 1" in shown.get()
    assert "int8 (failed)" in shown.get()
    assert "BUSY MACHINE" in shown.get()


def test_notes_name_failures_and_a_busy_machine() -> None:
    failed, busy = notes(example())
    assert failed == "torchaccel:int8 failed: RuntimeError: no compiler"
    assert "quiet" in busy
    assert "1.50 before, - after" in busy
