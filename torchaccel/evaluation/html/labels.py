"""Names next to points, none over another: each goes to the best free place around its point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from .drawing import HALO
from .palette import Look, stand_in

MARKER = 7.0
Pixels: TypeAlias = NDArray[np.float64]
# Fonts of other machines may be wider than the one that measures.
SLACK = 1.08
RADII = (9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 86.0, 106.0, 130.0)
# Right, left, above and below first, then the diagonals, then what is between.
ANGLES = tuple(math.radians(a) for a in (0, 180, 90, 270, 45, 315, 135, 225, *(a + 22.5 for a in range(0, 360, 45))))
FAR = 16.0
PADDING = 1.5
STEP = 3.0
# What a place costs, in pixels away from the point: a pixel of area on another name, on a point or outside the axes
# (more than any distance), a pixel of line under the name, and the line that ties a far name to its point.
COVERED = 1000.0
CROSSED = 0.8
TIED = 15.0


@dataclass(frozen=True)
class NamedPoint:
    """A point of a plot in data coordinates."""

    x: float
    y: float
    look: Look


def draw_points(axes: Axes, points: Sequence[NamedPoint]) -> None:
    """Draw every point with its variant's marker and write its name beside it; the axes' limits must be final."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    lines = _line_pixels(axes)
    for point in points:
        look = point.look
        (mark,) = axes.plot(point.x, point.y, look.marker, markersize=MARKER, markeredgewidth=1.4, zorder=4)
        mark.set(markerfacecolor=look.face, markeredgecolor=look.colour, clip_on=False)
    centres = axes.transData.transform([(point.x, point.y) for point in points])
    half = MARKER / 2 + 1
    taken = np.hstack([centres - half, centres + half])
    for point, centre in zip(points, centres, strict=True):
        taken = np.vstack([taken, _write(axes, point, centre, taken, lines)])


def _write(axes: Axes, point: NamedPoint, centre: Pixels, taken: Pixels, lines: Pixels) -> Pixels:
    """Write the name of ``point`` in its cheapest place, and return its box."""
    note = axes.annotate(
        point.look.label,
        (point.x, point.y),
        xytext=(0, 0),
        textcoords="offset points",
        va="center",
        zorder=5,
        arrowprops={"arrowstyle": "-", "color": stand_in("muted"), "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
    )
    note.set_in_layout(False)
    note.set_gid(HALO)
    size = note.get_window_extent()
    offsets, boxes = _places(size.width * SLACK, size.height)
    boxes += np.tile(centre, 2)
    best = int(np.argmin(_costs(boxes, taken, lines, np.array(axes.bbox.extents))))
    (dx, dy), radius = offsets[best], RADII[best // len(ANGLES)]
    note.set(position=(dx, dy), ha="left" if dx > 0 else "right" if dx < 0 else "center")
    if radius <= FAR and note.arrow_patch is not None:
        note.arrow_patch.set_visible(False)
    return boxes[best]


def _places(width: float, height: float) -> tuple[Pixels, Pixels]:
    """Around the origin, nearest first: anchors ``[N, 2]``, the middle of a box's near side, and boxes ``[N, 4]``."""
    directions = np.array([(math.cos(angle), math.sin(angle)) for angle in ANGLES]).round(6)
    anchors = np.concatenate([radius * directions for radius in RADII])
    # Above and below, the box needs half its height more to clear the point.
    anchors[:, 1] += np.tile(directions[:, 1], len(RADII)) * height / 2
    left = anchors[:, 0] + (np.sign(anchors[:, 0]) - 1) * width / 2
    bottom = anchors[:, 1] - height / 2
    return anchors, np.column_stack([left, bottom, left + width, bottom + height])


def _costs(boxes: Pixels, taken: Pixels, lines: Pixels, inside: Pixels) -> Pixels:
    """Cost ``[N]`` of each of ``boxes``."""
    padded = boxes + PADDING * np.array([-1, -1, 1, 1])
    covered = _overlap(padded, taken).sum(axis=1)
    outside = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - _overlap(boxes, inside[None])[:, 0]
    under = (lines > padded[:, None, :2]) & (lines < padded[:, None, 2:])
    crossed = STEP * under.all(axis=2).sum(axis=1)
    away = np.repeat([radius + TIED * (radius > FAR) for radius in RADII], len(ANGLES))
    costs: Pixels = COVERED * (covered + outside) + CROSSED * crossed + away
    return costs.round(3)


def _overlap(boxes: Pixels, others: Pixels) -> Pixels:
    """Area ``[N, M]`` that each of ``boxes`` ``[N, 4]`` shares with each of ``others`` ``[M, 4]``."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared: Pixels = np.prod(np.clip(high - low, 0, None), axis=2)
    return shared


def _line_pixels(axes: Axes) -> Pixels:
    """Pixels ``[N, 2]`` along the lines drawn so far, ``STEP`` apart."""
    found = [np.empty((0, 2))]
    for line in axes.lines:
        corners = line.get_transform().transform(line.get_xydata())
        for start, end in itertools.pairwise(corners):
            count = max(2, int(np.hypot(*(end - start)) / STEP) + 1)
            found.append(np.linspace(start, end, min(count, 1000)))
    return np.concatenate(found)
