"""The measures of fidelity that plots are drawn against, and where a document's variants have them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .documents import Document, Row


@dataclass(frozen=True)
class Metric:
    """A measure of fidelity; ``sign`` is +1 where smaller is better and -1 where larger is.

    Differences below ``least`` are rounding.
    """

    name: str
    label: str
    unit: str
    sign: int
    least: float
    of: Callable[[Row], float | None]


@dataclass(frozen=True)
class Joined:
    """A variant of one document with the fidelity that ``source`` measured of it."""

    row: Row
    value: float


@dataclass(frozen=True)
class Comparison:
    """The variants of ``document`` whose ``metric`` is known, and the names of those where it is not."""

    document: Document
    source: Document
    metric: Metric
    joined: Sequence[Joined]
    missing: Sequence[str]

    @property
    def where(self) -> str:
        """A sentence that names the source where it is another document, and the variants that are not shown."""
        words = f" Fidelity as document {self.source.index} measured it." if self.source is not self.document else ""
        return words + (f" Not shown, for want of a measurement: {', '.join(self.missing)}." if self.missing else "")


def _perplexity_loss(row: Row) -> float | None:
    ratio = row.number("fidelity", "perplexity_ratio")
    return None if ratio is None else (ratio - 1) * 100


def _recall(row: Row) -> float | None:
    return None if row.mean_recall is None else row.mean_recall * 100


def _divergence(row: Row) -> float | None:
    return row.number("fidelity", "kl")


PERPLEXITY = Metric("perplexity", "perplexity above float32 eager's", " %", 1, 1e-3, _perplexity_loss)
DIVERGENCE = Metric("kl", "KL divergence from float32 eager, nats per token", "", 1, 1e-6, _divergence)
RECALL = Metric("recall", "mean recall", " %", -1, 1.0, _recall)


def comparisons(
    document: Document, documents: Sequence[Document], usable: Callable[[Row], float | None]
) -> list[Comparison]:
    """The variants of ``document`` that ``usable`` has a number for, against perplexity or else KL, and against recall.

    Fidelity comes from a document about the same model: an ``evaluate`` one if there is one, then ``document`` itself.
    """
    perplexity = _compare(document, documents, usable, PERPLEXITY)
    divergence = None if perplexity else _compare(document, documents, usable, DIVERGENCE)
    recall = _compare(document, documents, usable, RECALL)
    return [found for found in (perplexity, divergence, recall) if found is not None]


def _compare(
    document: Document, documents: Sequence[Document], usable: Callable[[Row], float | None], metric: Metric
) -> Comparison | None:
    rows = [row for row in document.rows if row.ran and usable(row) is not None]
    sources = [other for other in documents if other.same_model(document)]
    for source in sorted(sources, key=lambda other: (other.kind != "evaluate", other is not document)):
        known = _values(source, metric)
        joined = [Joined(row, known[row.key]) for row in rows if row.key in known]
        if len(joined) > 1:
            missing = [row.variant for row in rows if row.key not in known]
            return Comparison(document, source, metric, joined, missing)
    return None


def _values(source: Document, metric: Metric) -> Mapping[tuple[str, str], float]:
    found = {row.key: metric.of(row) for row in source.rows if row.ran}
    return {key: value for key, value in found.items() if value is not None}
