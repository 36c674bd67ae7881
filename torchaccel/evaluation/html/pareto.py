"""What a variant gains against what it loses: speed against fidelity, and the cache's size against fidelity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from .documents import Document
from .drawing import Plot, finish, new_axes
from .fidelity import Comparison, comparisons
from .labels import NamedPoint, draw_points
from .numerals import significant
from .palette import Looks, short, stand_in
from .scales import plain, positive, signed

HEIGHT = 330


def speed_against_fidelity(document: Document, documents: Sequence[Document], looks: Looks) -> Iterator[Plot]:
    """One Pareto plot per measure of fidelity; speed is the speed-up over the document's first baseline."""
    if not document.baselines:
        return
    baseline = document.baselines[0]
    for found in comparisons(document, documents, lambda row: document.speedup(row, baseline)):
        speeds = [document.speedup(each.row, baseline) or 0.0 for each in found.joined]
        figure, axes = new_axes(HEIGHT)
        _fidelity_axis(axes, found)
        positive(axes, speeds)
        axes.set_ylabel(f"times faster than {short(baseline)}")
        _front(axes, _losses(found), [-speed for speed in speeds], found.metric.sign)
        _corner(axes, found, "top")
        draw_points(axes, _points(found, speeds, looks))
        caption = (
            f"{_side(found)} and higher is better: the line is the Pareto front, no variant is at once faster and "
            f"closer to float32 eager than one on it.{found.where}"
        )
        name = f"d{document.index}-pareto-{found.metric.name}"
        yield finish(figure, name, "Speed against fidelity", caption, _words(found, speeds, "times"))


def memory_against_fidelity(document: Document, documents: Sequence[Document], looks: Looks) -> Iterator[Plot]:
    """One plot of KV cache bytes per measure of fidelity."""
    for found in comparisons(document, documents, lambda row: row.number("kv_bytes") or None):
        sizes = [(each.row.number("kv_bytes") or 0.0) / 1e6 for each in found.joined]
        figure, axes = new_axes(HEIGHT)
        _fidelity_axis(axes, found)
        positive(axes, sizes)
        axes.set_ylabel("KV cache, MB")
        _front(axes, _losses(found), sizes, found.metric.sign)
        _corner(axes, found, "bottom")
        draw_points(axes, _points(found, sizes, looks))
        caption = (
            f"{_side(found)} and lower is better: the line joins the variants that no other beats in both size and "
            f"fidelity.{found.where}"
        )
        name = f"d{document.index}-memory-{found.metric.name}"
        yield finish(figure, name, "Cache size against fidelity", caption, _words(found, sizes, "MB"))


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in one cost without losing in the other, by the first cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: costs[i]):
        if not front or costs[index][1] < costs[front[-1]][1]:
            front.append(index)
    return front


def _losses(found: Comparison) -> list[float]:
    return [found.metric.sign * each.value for each in found.joined]


def _front(axes: Axes, losses: Sequence[float], costs: Sequence[float], sign: int) -> None:
    """The staircase of the front; ``losses`` carry ``sign``, ``costs`` are positive where less is better."""
    front = pareto_front(list(zip(losses, costs, strict=True)))
    corners = [(sign * losses[i], abs(costs[j])) for i, j in zip(front, [front[0], *front], strict=False)]
    ends = [(sign * losses[i], abs(costs[i])) for i in front]
    x, y = zip(*[place for pair in zip(corners, ends, strict=True) for place in pair], strict=True)
    axes.plot(x, y, color=stand_in("muted"), linewidth=1.2, zorder=2)


def _fidelity_axis(axes: Axes, found: Comparison) -> None:
    metric = found.metric
    values = [each.value for each in found.joined]
    axes.set_xlabel(metric.label)
    if metric.sign > 0:
        signed(axes, "x", values, metric.unit, metric.least)
    else:
        plain(axes.xaxis, metric.unit)
        axes.set_xlim(min(*values, 95.0) - 5, 104)


def _corner(axes: Axes, found: Comparison, vertical: str) -> None:
    """Say above the plot which corner is the good one."""
    left = found.metric.sign > 0
    arrows = {(True, "top"): "↖", (True, "bottom"): "↙", (False, "top"): "↗", (False, "bottom"): "↘"}
    arrow = arrows[left, vertical]
    axes.set_title(
        f"{arrow} better" if left else f"better {arrow}",
        loc="left" if left else "right",
        color=stand_in("muted"),
        fontsize=10,
    )


def _side(found: Comparison) -> str:
    return "Further left" if found.metric.sign > 0 else "Further right"


def _points(found: Comparison, heights: Sequence[float], looks: Looks) -> list[NamedPoint]:
    pairs = zip(found.joined, heights, strict=True)
    return [NamedPoint(each.value, height, looks.of(each.row)) for each, height in pairs]


def _words(found: Comparison, heights: Sequence[float], unit: str) -> str:
    metric = found.metric
    pairs = zip(found.joined, heights, strict=True)
    return f"{metric.label}: " + "; ".join(
        f"{each.row.variant} {significant(height)} {unit} at {significant(each.value)}{metric.unit}"
        for each, height in pairs
    )
