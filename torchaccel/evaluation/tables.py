"""The results document for the eye."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

PREFIX = "torchaccel:"


def comparison_table(title: str, headers: list[str], rows: list[tuple[str, list[str]]]) -> Table:
    """A table of variants with right-aligned columns; torchaccel's variants stand together under its name."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    table.add_column("variant", no_wrap=True)
    for name in headers:
        table.add_column(name, justify="right", no_wrap=True)
    for variant, cells in rows:
        if not variant.startswith(PREFIX):
            table.add_row(variant, *cells)
    table.add_row(PREFIX.rstrip(":"))
    for variant, cells in rows:
        if variant.startswith(PREFIX):
            table.add_row(f"  {variant.removeprefix(PREFIX)}", *cells)
    return table


def results_table(document: dict[str, Any]) -> Table:
    """One row per variant of a results document; times in milliseconds, ``x`` columns are speed-ups over a baseline."""
    case = document["case"]
    results = document["results"]
    others = [r["variant"] for r in results if not r["variant"].startswith(PREFIX) and r["speedup"] is not None]
    times = ["first\ntoken ms", "ms per\ntoken"] if case["kind"] == "generate" else ["ms"]
    headers = [*times, *(f"x\n{name}" for name in others), "of\nroofline", "KV\nMB", "peak\nMB", "graphs", "error"]
    title = f"{document['model']['name']}, {case['kind']}, context {case['context']}, batch {case['batch']}"
    rows = []
    for r in results:
        spreads = (r["ttft_ms"], r["tpot_ms"]) if case["kind"] == "generate" else (r["ms"],)
        speedup = r["speedup"] or {}
        cells = [_number(spread and spread["median"], 2) for spread in spreads]
        cells += [_number(speedup.get(name), 2) for name in others]
        cells += [_number(r["roofline_fraction"], 2), _number(r["kv_bytes"], 1, 1e6), _number(r["peak_bytes"], 1, 1e6)]
        cells += [_number(r["graphs"], 0), _number(r["fidelity"]["max_abs_err_vs_fp32"], 4)]
        rows.append((r["variant"], cells))
    return comparison_table(title, headers, rows)


def notes(document: dict[str, Any]) -> list[str]:
    """What the table cannot say: variants that did not do what was asked, and a machine that was not quiet."""
    lines = [f"{r['variant']} {r['status']}: {r['reason']}" for r in document["results"] if r["status"] != "ok"]
    if document["machine"]["busy"]:
        lines.append("Other processes used the machine during the timing: repeat it on a quiet one before quoting it.")
    return lines


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
