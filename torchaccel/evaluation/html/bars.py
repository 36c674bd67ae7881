"""Speed: one bar per variant, with whiskers from the fastest to the slowest sample."""

from __future__ import annotations

from collections.abc import Iterator

from .documents import Document, Row, Spread
from .drawing import Plot, finish, new_axes
from .numerals import significant
from .palette import Looks, stand_in
from .scales import plain

TIMES = {"ms": "Time", "ttft_ms": "Time to the first token", "tpot_ms": "Time per token after the first"}
BAR = 25


def speed_bars(document: Document, looks: Looks) -> Iterator[Plot]:
    """One plot for each kind of time that the document has."""
    for name, title in TIMES.items():
        found = [(row, spread) for row in document.rows if row.ran and (spread := row.spread(name)) is not None]
        if found:
            what = title + document.per if name == "ms" else title
            yield _bars(f"d{document.index}-speed-{name.replace('_', '-')}", what, found, looks)


def _bars(name: str, title: str, found: list[tuple[Row, Spread]], looks: Looks) -> Plot:
    figure, axes = new_axes(62 + BAR * len(found))
    longest = max(spread.max for _, spread in found)
    for place, (row, spread) in enumerate(found):
        look = looks.of(row)
        axes.barh(place, spread.median, height=0.62, color=look.colour)
        whisker = [[spread.median - spread.min], [spread.max - spread.median]]
        axes.errorbar(spread.median, place, xerr=whisker, fmt="none", ecolor=stand_in("ink"), elinewidth=1, capsize=3)
        axes.annotate(
            significant(spread.median),
            (spread.max, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": stand_in("surface"), "edgecolor": "none"},
        )
    axes.set_yticks(range(len(found)), [looks.of(row).label for row, _ in found])
    axes.tick_params(axis="y", length=0, labelcolor=stand_in("ink"))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.18)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    plain(axes.xaxis)
    axes.set_xlabel("milliseconds")
    caption = (
        "Shorter is faster: the bar ends at the median, the whisker spans the fastest to the slowest sample; "
        "torchaccel in colour, baselines in grey."
    )
    words = "; ".join(
        f"{row.variant} {significant(s.median)} ms, {significant(s.min)} to {significant(s.max)}" for row, s in found
    )
    return finish(figure, name, title, caption, words)
