"""The suite's results as a table: time, share of the roofline, error, and what was to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def suite_table(found: Mapping[str, Any]) -> Table:
    """One row per contender of every scenario."""
    table = Table(title=f"attention, suite {found['case']['suite']}")
    for name, justify in (
        ("scenario", "left"),
        ("contender", "left"),
        ("ms", "right"),
        ("roofline", "right"),
        ("error", "right"),
        ("density", "right"),
        ("goal", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for result in found["results"]:
        contender, _, scenario = result["variant"].partition("@")
        table.add_row(
            scenario,
            contender,
            _number(result["ms"] and result["ms"]["median"], ".3f"),
            _number(result["roofline_fraction"], ".2f"),
            _number(result["fidelity"]["max_abs_err_vs_fp32"], ".1e"),
            _number(result["density"], ".3f"),
            result["reason"] or "; ".join(_goal(goal) for goal in (result["details"] or {}).get("goals", [])),
        )
    return table


def _goal(goal: Mapping[str, Any]) -> str:
    verdict = "reached" if goal["ok"] else "MISSED"
    return f"{goal['reached']:.2f} {goal['text']} (at least {goal['asked']:.2f}: {verdict})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
