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
    kind = " ".join(filter(None, (case["kind"], case.get("phase"))))
    title = f"{document['model']['name']}, {kind}, context {case['context']}, batch {case['batch']}"
    if document["machine"]["busy"]:
        title += "\n[bold red]BUSY MACHINE: other processes ran during the timing[/bold red]"
    rows = []
    for r in results:
        spreads = (r["ttft_ms"], r["tpot_ms"]) if case["kind"] == "generate" else (r["ms"],)
        speedup = r["speedup"] or {}
        cells = [_number(spread and spread["median"], 2) for spread in spreads]
        cells += [_number(speedup.get(name), 2) for name in others]
        cells += [_number(r["roofline_fraction"], 2), _number(r["kv_bytes"], 1, 1e6), _number(r["peak_bytes"], 1, 1e6)]
        cells += [_number(r["graphs"], 0), _number(r["fidelity"]["max_abs_err_vs_fp32"], 4)]
        rows.append((r["variant"] + ("" if r["status"] == "ok" else f" ({r['status']})"), cells))
    return comparison_table(title, headers, rows)


def evaluation_table(document: dict[str, Any]) -> Table:
    """One row per variant of an evaluation: fidelity first, then bytes and speed; empty columns are left out."""
    results = document["results"]
    tasks = list(dict.fromkeys(name for r in results for name in r["fidelity"]["recall"] or {}))
    columns: list[tuple[str, list[str]]] = [
        ("perplexity", [_number(r["fidelity"]["perplexity"], 3) for r in results]),
        ("x float32 [95 %]", [_interval(r["fidelity"]) for r in results]),
        ("bits per\nbyte", [_number(r["fidelity"]["bits_per_byte"], 3) for r in results]),
        ("KL", [_scientific(r["fidelity"]["kl"]) for r in results]),
        ("top-1", [_number(r["fidelity"]["top1"], 4) for r in results]),
        ("greedy\nprefix", [_prefix(r) for r in results]),
        ("max logit\nerror", [_scientific(r["fidelity"]["max_abs_err_vs_fp32"]) for r in results]),
        ("cosine\nmean", [_number(_detail(r, "similarity", "mean"), 6) for r in results]),
        ("cosine\nmin", [_number(_detail(r, "similarity", "min"), 6) for r in results]),
    ]
    columns += [
        (name.replace("_", "\n"), [_number((r["fidelity"]["recall"] or {}).get(name), 2) for r in results])
        for name in tasks
    ]
    columns += [
        ("KV\nMB", [_number(r["kv_bytes"], 2, 1e6) for r in results]),
        ("ms per\ntoken", [_number(r["tpot_ms"] and r["tpot_ms"]["median"], 2) for r in results]),
        ("x\neager", [_number((r["speedup"] or {}).get("eager"), 2) for r in results]),
    ]
    used = [(header, cells) for header, cells in columns if any(cell != "-" for cell in cells)]
    case, name = document["case"], document["model"]["name"]
    read = any(_detail(r, "perplexity", "window") for r in results)
    title = f"{name}, windows of {case['window']}, prompt {case['prompt']}" if read else name
    rows = [(r["variant"], [cells[index] for _, cells in used]) for index, r in enumerate(results)]
    return comparison_table(title, [header for header, _ in used], rows)


def _interval(fidelity: dict[str, Any]) -> str:
    if fidelity["perplexity_ratio"] is None:
        return "-"
    interval = fidelity["perplexity_ratio_ci95"]
    low_high = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"{fidelity['perplexity_ratio']:.4f}{low_high}"


def _prefix(result: dict[str, Any]) -> str:
    found = _detail(result, "agreement", "greedy_prefix")
    return "-" if found is None else f"{found['mean']:.1f}/{found['of']}"


def _detail(result: dict[str, Any], part: str, name: str) -> Any:
    return ((result["details"] or {}).get(part) or {}).get(name)


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def notes(document: dict[str, Any]) -> list[str]:
    """What the table cannot say: variants that did not do what was asked, and a machine that was not quiet."""
    lines = [f"{r['variant']} {r['status']}: {r['reason']}" for r in document["results"] if r["status"] != "ok"]
    lines += [line for r in document["results"] for line in _by_layer(r)]
    machine = document["machine"]
    if machine["busy"] and any(r["ms"] or r["ttft_ms"] for r in document["results"]):
        lines.append(
            "Other processes used the machine during the timing (load average "
            f"{_number(machine['load_before'], 2)} before, {_number(machine['load_after'], 2)} after): repeat it on a "
            "quiet one before quoting it."
        )
    return lines


def _by_layer(result: dict[str, Any]) -> list[str]:
    found = (result.get("details") or {}).get("sensitivity")
    if not found:
        return []
    if found["reason"]:
        return [f"{result['variant']}: {found['reason']}"]
    losses = ", ".join(f"{layer['layer']}: {layer['kl']:.1e}" for layer in found["layers"])
    return [f"{result['variant']}, KL with one layer treated: {losses}"]


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
