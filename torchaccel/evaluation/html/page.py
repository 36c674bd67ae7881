"""The page: documents in, HTML out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .bars import speed_bars
from .buckets import perplexity_by_position
from .commands import Command, commands
from .documents import Document, mapping, parse, text
from .drawing import Plot, drawing_style
from .heatmap import recall_maps
from .numerals import ABSENT, significant
from .palette import ROLES, Looks
from .pareto import memory_against_fidelity, speed_against_fidelity
from .roofline import roofline
from .sensitivity import layer_sensitivity
from .table import Column, Trouble, columns, troubles

VERSIONS = ("torchaccel", "torch", "triton", "transformers", "python", "compiler")


@dataclass(frozen=True)
class Section:
    """What the page says about one document."""

    document: Document
    facts: list[str]
    columns: list[Column]
    troubles: list[Trouble]
    plots: list[Plot]
    commands: list[Command]


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page about results documents; equal documents give equal pages.

    Raises ``ValueError`` for an object that is no results document.
    """
    parsed = parse(documents)
    looks = Looks(parsed)
    with drawing_style():
        sections = [_section(document, parsed, looks) for document in parsed]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            sections=sections,
            models=_distinct(_model(document) for document in parsed),
            machines=_distinct(_machine(document) for document in parsed),
            versions=_distinct(_versions(document) for document in parsed),
            dates=_distinct(text(document.record, "date") or "" for document in parsed),
            busy=[document for document in parsed if document.busy],
            roles=ROLES,
        )
    )


def write_report(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page about ``documents`` to ``path``."""
    path.write_text(render(documents), encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _section(document: Document, documents: Sequence[Document], looks: Looks) -> Section:
    return Section(
        document,
        list(_facts(document)),
        columns(document),
        troubles(document),
        list(_plots(document, documents, looks)),
        commands(document),
    )


def _plots(document: Document, documents: Sequence[Document], looks: Looks) -> Iterator[Plot]:
    yield from speed_against_fidelity(document, documents, looks)
    yield from memory_against_fidelity(document, documents, looks)
    yield from recall_maps(document, looks)
    yield from perplexity_by_position(document, looks)
    yield from roofline(document, looks)
    yield from layer_sensitivity(document, looks)
    yield from speed_bars(document, looks)


def _facts(document: Document) -> Iterator[str]:
    """What is particular to this run: the machine's rates and load, the samples, the perplexity's text."""
    read, copy = document.number("machine", "read_gbs"), document.number("machine", "copy_gbs")
    if read is not None:
        yield f"memory read at {significant(read)} GB/s" + (f", copied at {significant(copy)}" if copy else "")
    rates = mapping(document.record, "machine", "gemm_gflops")
    said = [f"{significant(document.number('machine', 'gemm_gflops', name))} in {name}" for name in rates]
    if said:
        yield f"matrix products at {', '.join(said)} GFLOP/s"
    loads = [document.number("machine", name) for name in ("load_before", "load_after")]
    if any(load is not None for load in loads):
        yield "load " + " → ".join(ABSENT if load is None else f"{load:.2f}" for load in loads)
    rounds = document.number("case", "rounds")
    if rounds is not None:
        yield f"{rounds:g} interleaved rounds"


def _model(document: Document) -> str:
    words = [document.model]
    parameters, size = document.number("model", "params"), document.number("model", "weight_bytes")
    if parameters is not None:
        words.append(f"{significant(parameters / 1e6)} M parameters")
    words.append(text(document.record, "model", "dtype") or "")
    if size is not None:
        words.append(f"{significant(size / 1e6)} MB of weights")
    shape = {name: document.number("model", name) for name in ("layers", "heads", "kv_heads", "head_dim")}
    words += [f"{name.replace('_', ' ')} {value:g}" for name, value in shape.items() if value is not None]
    return ", ".join(word for word in words if word)


def _machine(document: Document) -> str:
    cores = document.number("machine", "cores")
    device = text(document.record, "machine", "device") or ""
    return device if cores is None else f"{device}, {cores:g} cores".removeprefix(", ")


def _versions(document: Document) -> str:
    found = {name: text(document.record, "versions", name) for name in VERSIONS}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _distinct(words: Iterator[str]) -> list[str]:
    return [word for word in dict.fromkeys(words) if word]
