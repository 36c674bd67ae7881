"""The table of a document: one row per variant, and only the columns that say something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .documents import Document, Row, Spread, mapping, number, sequence
from .numerals import ABSENT, fixed, megabytes, percent, significant

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Column:
    """A column: its heading, what the heading means, and a cell per row of the document."""

    heading: str
    meaning: str
    cells: list[str]


@dataclass(frozen=True)
class Trouble:
    """A variant that did not run as asked."""

    variant: str
    status: str
    reason: str


def columns(document: Document) -> list[Column]:
    """The columns that have a value in at least one row."""
    found = [Column(name, meaning, [cell(row) for row in document.rows]) for name, meaning, cell in _all(document)]
    return [column for column in found if any(cell != ABSENT for cell in column.cells)]


def troubles(document: Document) -> list[Trouble]:
    """Every variant that is not "ok", with its reason."""
    return [
        Trouble(row.variant, row.status, str(row.record.get("reason") or "no reason given"))
        for row in document.rows
        if not row.ok
    ]


def _all(document: Document) -> Iterator[tuple[str, str, Cell]]:
    yield f"ms{document.per}", "median of the samples [fastest–slowest]", lambda row: _spread(row.spread("ms"))
    yield "ms to first token", "median [fastest–slowest]", lambda row: _spread(row.spread("ttft_ms"))
    yield "ms per token", "after the first, median [fastest–slowest]", lambda row: _spread(row.spread("tpot_ms"))
    for baseline in document.baselines:
        ratio = _speedup(document, baseline)
        yield f"×\N{NO-BREAK SPACE}{baseline}", f"times faster than {baseline}, from interleaved samples", ratio
    yield "floor ms", "least time for the variant's own bytes and FLOPs on this machine", _significant("bound_ms")
    yield "of floor", "floor ÷ measured: 100 % is the machine's limit", _percent("roofline_fraction")
    yield "predicted ms", "by the cost model", _significant("predicted_ms")
    yield "KV MB", "KV cache as allocated, 10⁶ bytes", lambda row: megabytes(row.number("kv_bytes"))
    yield "peak MB", "all memory, 10⁶ bytes", lambda row: megabytes(row.number("peak_bytes"))
    yield "graphs / recompiles", "compiled graphs, and those compiled again", _graphs
    yield "compile s cold / warm", "seconds to compile, with cold and with warm caches", _compile
    yield "key blocks", "fraction of key blocks that sparse attention visits", _percent("density")
    yield from _fidelity(document)


def _fidelity(document: Document) -> Iterator[tuple[str, str, Cell]]:
    yield "max error", "largest logit difference to float32 eager", _significant("fidelity", "max_abs_err_vs_fp32")
    yield "eager's error", "the same for eager in this dtype", _significant("fidelity", "eager_max_abs_err_vs_fp32")
    yield "KL", "divergence from float32 eager, nats per token", _significant("fidelity", "kl")
    yield "top-1", "tokens with the same most likely successor", _percent("fidelity", "top1", digits=1)
    yield "greedy prefix", "leading tokens equal to the reference's greedy answer", _greedy
    yield "perplexity", "on the document's text", _fixed("fidelity", "perplexity", digits=3)
    yield "÷ float32", "perplexity over float32 eager's [95 % confidence interval]", _ratio
    yield "bits/byte", "bits per byte of text", _fixed("fidelity", "bits_per_byte", digits=4)
    for task in dict.fromkeys(task for row in document.rows for task in mapping(row.record, "fidelity", "recall")):
        yield f"recall {task}", "questions answered", _percent("fidelity", "recall", task)
    yield "similarity", "cosine to float32 eager, mean (least)", _similarity


def _speedup(document: Document, baseline: str) -> Cell:
    return lambda row: fixed(document.speedup(row, baseline), 2)


def _significant(*path: str) -> Cell:
    return lambda row: significant(row.number(*path))


def _fixed(*path: str, digits: int) -> Cell:
    return lambda row: fixed(row.number(*path), digits)


def _percent(*path: str, digits: int = 0) -> Cell:
    return lambda row: percent(row.number(*path), digits)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ABSENT
    return f"{significant(spread.median)} [{significant(spread.min)}–{significant(spread.max)}]"


def _graphs(row: Row) -> str:
    return _pair(fixed(row.number("graphs"), 0), fixed(row.number("recompiles"), 0))


def _compile(row: Row) -> str:
    return _pair(*(fixed(row.number("compile_s", caches), 1) for caches in ("cold", "warm")))


def _pair(first: str, second: str) -> str:
    return ABSENT if first == second == ABSENT else f"{first} / {second}"


def _greedy(row: Row) -> str:
    mean, least, of = (row.number("details", "agreement", "greedy_prefix", name) for name in ("mean", "min", "of"))
    if mean is not None:
        return f"{mean:.1f} (least {fixed(least, 0)}) of {fixed(of, 0)}"
    return fixed(row.number("fidelity", "greedy_prefix"), 0)


def _ratio(row: Row) -> str:
    ratio = row.number("fidelity", "perplexity_ratio")
    interval = [number(value) for value in sequence(row.record, "fidelity", "perplexity_ratio_ci95")]
    if ratio is None or len(interval) != 2:
        return fixed(ratio, 4)
    return f"{fixed(ratio, 4)} [{fixed(interval[0], 4)}–{fixed(interval[1], 4)}]"


def _similarity(row: Row) -> str:
    mean, least = (row.number("details", "similarity", name) for name in ("mean", "min"))
    return ABSENT if mean is None else f"{mean:.4f} ({fixed(least, 4)})"
