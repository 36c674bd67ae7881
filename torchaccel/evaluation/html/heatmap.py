"""Recall by place and length: one map per task and variant, depth of the answer down, length of the text across."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .documents import Document, Row, mapping, number, sequence
from .drawing import WIDTH, Plot, finish, new_figure
from .numerals import ABSENT, percent
from .palette import Looks, short, stand_in

CELL = 34
ROW = 17
SIDE = 56
GAP = 14
CHARACTER = 7.2
PALEST = 0.05
DARK = 0.6


@dataclass(frozen=True)
class Grid:
    """Scores 0 to 1 of one variant: ``scores[i][j]`` at ``lengths[i]`` tokens and ``depths[j]``, None if unknown."""

    row: Row
    lengths: tuple[float, ...]
    depths: tuple[float, ...]
    scores: tuple[tuple[float | None, ...], ...]
    questions: float | None


def recall_maps(document: Document, looks: Looks) -> Iterator[Plot]:
    """One plot per task, with a map for each variant."""
    tasks = dict.fromkeys(task for row in document.rows for task in mapping(row.record, "details", "recall"))
    for order, task in enumerate(tasks):
        found = [grid for row in document.rows if row.ran and (grid := _grid(row, task)) is not None]
        if found:
            yield _maps(f"d{document.index}-recall-{order}", task, found, looks)


def _grid(row: Row, task: str) -> Grid | None:
    record = mapping(row.record, "details", "recall", task)
    lengths, depths = (tuple(number(v) or 0.0 for v in sequence(record, n)) for n in ("lengths", "depths"))
    rows = [line if isinstance(line, list) else [] for line in sequence(record, "scores")]
    if not lengths or not depths or not rows:
        return None
    scores = tuple(tuple(_at(rows, i, j) for j in range(len(depths))) for i in range(len(lengths)))
    return Grid(row, lengths, depths, scores, number(record, "questions"))


def _at(rows: list[list[object]], i: int, j: int) -> float | None:
    value = number(rows[i][j]) if i < len(rows) and j < len(rows[i]) else None
    return None if value is None else min(max(value, 0.0), 1.0)


def _maps(name: str, task: str, found: list[Grid], looks: Looks) -> Plot:
    widest, deepest = (max(len(getattr(grid, side)) for grid in found) for side in ("lengths", "depths"))
    across = min(max(1, (WIDTH - SIDE) // max(CELL * widest + GAP, 96)), len(found))
    down = math.ceil(len(found) / across)
    figure = new_figure(56 + down * (26 + ROW * deepest))
    panels = figure.subplots(down, across, squeeze=False)
    room = int((WIDTH - SIDE) / across / CHARACTER)
    for place, axes in enumerate(panels.flat):
        if place >= len(found):
            axes.set_axis_off()
            continue
        grid = found[place]
        _map(axes, grid)
        axes.set_title(short(looks.of(grid.row).label, room), color=stand_in("ink"), loc="left", fontsize=10)
        # Neighbours share their labels where they can.
        if place % across and found[place - 1].depths == grid.depths:
            axes.set_yticklabels([])
        if place + across < len(found) and found[place + across].lengths == grid.lengths:
            axes.set_xticklabels([])
    figure.supxlabel("tokens of text", fontsize=10.5, color=stand_in("muted"))
    figure.supylabel("depth of the answer", fontsize=10.5, color=stand_in("muted"))
    asked = {grid.questions for grid in found if grid.questions is not None}
    caption = (
        "The stronger the colour the better: each cell is the percentage of questions answered, from an answer at the "
        "start of the text (top) to one at its end (bottom); every map has the same scale, 0 to 100."
    )
    if asked:
        caption += f" Questions per cell: {' or '.join(f'{count:g}' for count in sorted(asked))}."
    words = "; ".join(f"{grid.row.variant} {percent(_mean(grid))} on average" for grid in found)
    return finish(figure, name, f"Recall: {task}", caption, words)


def _map(axes: Axes, grid: Grid) -> None:
    for i, line in enumerate(grid.scores):
        for j, score in enumerate(line):
            alpha = PALEST + (1 - PALEST) * (score or 0.0)
            axes.add_patch(Rectangle((i - 0.48, j - 0.46), 0.96, 0.92, color=stand_in("series-1"), alpha=alpha, lw=0))
            shown = ABSENT if score is None else f"{100 * score:.0f}"
            colour = stand_in("on-series" if score is not None and score > DARK else "ink")
            axes.text(i, j, shown, ha="center", va="center_baseline", fontsize=10, color=colour)
    axes.set_xticks(range(len(grid.lengths)), [_tokens(length) for length in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), [percent(depth) for depth in grid.depths])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.5, len(grid.lengths) - 0.5)
    axes.set_ylim(len(grid.depths) - 0.5, -0.5)


def _tokens(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 and length % 1024 == 0 else f"{length:g}"


def _mean(grid: Grid) -> float | None:
    scores = [score for line in grid.scores for score in line if score is not None]
    return sum(scores) / len(scores) if scores else None
