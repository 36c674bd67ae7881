"""Roofline: measured time against the floor that the machine sets for each variant's own bytes and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes

from .documents import Document, Row
from .drawing import Plot, finish, new_axes
from .labels import NamedPoint, draw_points
from .numerals import percent, significant
from .palette import Looks, stand_in
from .scales import logarithmic

# The lines of equal fraction: fine ones, or coarse ones where the times span more decades than this.
FINE, COARSE, DECADES = (1.0, 0.5, 0.25, 0.1), (1.0, 0.1, 0.01, 0.001), 2.6


@dataclass(frozen=True)
class Timed:
    """A variant's times in milliseconds."""

    row: Row
    bound: float
    measured: float
    predicted: float | None


def roofline(document: Document, looks: Looks) -> Iterator[Plot]:
    """One plot of the variants whose floor is known."""
    found = [timed for row in document.rows if row.ran and (timed := _timed(row)) is not None]
    if not found:
        return
    figure, axes = new_axes(330)
    bounds = [timed.bound for timed in found]
    times = [time for timed in found for time in (timed.bound, timed.measured, timed.predicted) if time is not None]
    low, high = min(times) / 1.35, max(times) * 1.35
    _limits(axes, bounds, low, high)
    for fraction in FINE if math.log10(high / low) < DECADES else COARSE:
        _line(axes, fraction)
    for timed in found:
        if timed.predicted is not None:
            colour = looks.of(timed.row).colour
            axes.plot([timed.bound] * 2, [timed.measured, timed.predicted], color=colour, linewidth=1, zorder=3)
            axes.plot(timed.bound, timed.predicted, "_", color=colour, markersize=13, markeredgewidth=2, zorder=3)
    axes.set(xlabel="floor of the variant on this machine, ms", ylabel="measured, ms")
    draw_points(axes, [NamedPoint(timed.bound, timed.measured, looks.of(timed.row)) for timed in found])
    caption = (
        "Nearer to the diagonal is nearer to the machine's limit: a point on the line of 50 % takes twice the time its "
        "bytes and FLOPs need at the measured rates."
    )
    if any(timed.predicted is not None for timed in found):
        caption += " A dash tied to a point is what the cost model predicted."
    words = "; ".join(_words(timed) for timed in found)
    yield finish(figure, f"d{document.index}-roofline", "Distance from the machine's limit", caption, words)


def _timed(row: Row) -> Timed | None:
    spread, bound, predicted = row.spread("ms"), row.number("bound_ms"), row.number("predicted_ms")
    if spread is None or bound is None or bound <= 0:
        return None
    return Timed(row, bound, spread.median, predicted if predicted is not None and predicted > 0 else None)


def _limits(axes: Axes, bounds: list[float], low: float, high: float) -> None:
    """Limits of both axes, wide enough that names have room beside their points."""
    logarithmic(axes, "x", min(bounds) / 2.6, max(bounds) * 2.2)
    logarithmic(axes, "y", low, max(high, 2 * low))


def _line(axes: Axes, fraction: float) -> None:
    """The line of ``fraction``, named where it leaves the axes, if it crosses them."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    start, end = max(left, bottom * fraction), min(right, top * fraction)
    if start >= end:
        return
    whole = fraction == 1.0
    (line,) = axes.plot([start, end], [start / fraction, end / fraction], color=stand_in("muted"), zorder=2)
    line.set(linewidth=1.4 if whole else 0.9, linestyle="-" if whole else (0, (4, 3)))
    leaves_right = end == right
    axes.annotate(
        percent(fraction, 0 if fraction >= 0.01 else 1),
        (end, end / fraction),
        xytext=(4, 0) if leaves_right else (0, 3),
        textcoords="offset points",
        ha="left" if leaves_right else "center",
        va="center" if leaves_right else "bottom",
        color=stand_in("muted"),
        fontsize=10,
        annotation_clip=False,
    )


def _words(timed: Timed) -> str:
    said = f"{timed.row.variant} {significant(timed.measured)} ms, floor {significant(timed.bound)} ms"
    return said if timed.predicted is None else f"{said}, predicted {significant(timed.predicted)} ms"
