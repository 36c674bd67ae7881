"""Perplexity by position in the text: where along the context a variant loses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes

from .documents import Document, Row, number, sequence
from .drawing import Plot, finish, new_axes
from .fidelity import PERPLEXITY
from .numerals import significant
from .palette import Look, Looks, stand_in
from .scales import signed

DODGE = 0.6
UPRIGHT = 5


@dataclass(frozen=True)
class Bucket:
    """Perplexity above float32 eager's, in percent, at positions ``start`` to ``end``, with its 95 % interval."""

    start: float
    end: float
    loss: float
    low: float
    high: float

    @property
    def name(self) -> str:
        return f"{self.start:g}–{self.end:g}"


def perplexity_by_position(document: Document, looks: Looks) -> Iterator[Plot]:
    """One plot with a line per variant."""
    found = [(row, buckets) for row in document.rows if row.ran and (buckets := _buckets(row))]
    if not found:
        return
    names = list(dict.fromkeys(bucket.name for _, buckets in found for bucket in buckets))
    figure, axes = new_axes(300 + 15 * (len(found) // 3))
    axes.axhline(0.0, color=stand_in("muted"), linewidth=1)
    for turn, (row, buckets) in enumerate(found):
        aside = DODGE * ((turn + 0.5) / len(found) - 0.5)
        _line(axes, [names.index(bucket.name) + aside for bucket in buckets], buckets, looks.of(row))
    signed(
        axes,
        "y",
        [value for _, buckets in found for b in buckets for value in (b.loss, b.low, b.high)],
        " %",
        PERPLEXITY.least,
    )
    axes.set_xticks(range(len(names)), names)
    if len(names) > UPRIGHT:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="position in the text, tokens", ylabel="perplexity above float32 eager's")
    figure.legend(loc="outside lower center", ncols=min(3, len(found)), handlelength=1.6, columnspacing=1.4)
    caption = (
        "At 0 nothing is lost; a line that rises to the right loses more the longer the text. "
        "Whiskers are 95 % confidence intervals: one that crosses 0 may be chance."
    )
    words = "; ".join(
        f"{row.variant}: " + ", ".join(f"{b.name} {significant(b.loss)} %" for b in buckets) for row, buckets in found
    )
    yield finish(figure, f"d{document.index}-position", "Perplexity by position", caption, words)


def _line(axes: Axes, places: list[float], buckets: list[Bucket], look: Look) -> None:
    losses = [bucket.loss for bucket in buckets]
    axes.errorbar(
        places,
        losses,
        yerr=[[b.loss - b.low for b in buckets], [b.high - b.loss for b in buckets]],
        marker=look.marker,
        color=look.colour,
        markerfacecolor=look.face,
        markersize=6,
        linewidth=1.3,
        elinewidth=1.3,
        capsize=2.5,
        label=look.label,
    )


def _buckets(row: Row) -> list[Bucket]:
    records = sequence(row.record.get("details"), "perplexity", "buckets")
    found = [_bucket(record) for record in records]
    return [bucket for bucket in found if bucket is not None]


def _bucket(record: object) -> Bucket | None:
    start, end, ratio = (number(record, name) for name in ("from", "to", "ratio"))
    if start is None or end is None or ratio is None:
        return None
    interval = [value for end in sequence(record, "ratio_ci95") if (value := number(end)) is not None]
    low, high = min([ratio, *interval]), max([ratio, *interval])
    return Bucket(start, end, *((value - 1) * 100 for value in (ratio, low, high)))
