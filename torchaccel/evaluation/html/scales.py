"""Axes whose ticks are plain numbers: linear ones, and logarithmic ones where the values span decades."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

SPAN = 30.0
DECADES = 5


def plain(axis: Axis, unit: str = "", *, whole: bool = False) -> None:
    """About six ticks, labelled as plain numbers; ``whole``: up to twelve, at whole numbers alone."""
    axis.set_major_locator(MaxNLocator(12 if whole else 6, integer=whole, min_n_ticks=1))
    axis.set_major_formatter(_formatter(unit))


def positive(axes: Axes, values: Sequence[float]) -> None:
    """The y axis for positive values: from zero, or logarithmic when they span more than a factor of 30."""
    if max(values) / min(values) > SPAN:
        logarithmic(axes, "y", min(values) / 1.6, max(values) * 1.6)
        return
    plain(axes.yaxis)
    axes.set_ylim(0, max(values) * 1.12)


def logarithmic(axes: Axes, side: str, low: float, high: float) -> None:
    """Axis "x" or "y" logarithmic from ``low`` to ``high``, with as many ticks as there is room for."""
    axes.set(**{f"{side}scale": "log"})
    axis = _axis(axes, side)
    decades = math.log10(high / low)
    finest = ((0.8, [1, 1.5, 2, 3, 4, 5, 6, 8]), (2.2, [1, 2, 5]), (3.3, [1, 3]), (math.inf, [1]))
    subs = next(steps for reach, steps in finest if decades < reach)
    axis.set_major_locator(LogLocator(10, subs, numticks=20))
    axis.set_major_formatter(_formatter())
    axis.set_minor_locator(NullLocator())
    axes.set(**{f"{side}lim": (low, high)})


def signed(axes: Axes, side: str, values: Sequence[float], unit: str, least: float) -> None:
    """Axis "x" or "y" for values around zero: linear, or linear near zero and logarithmic beyond when they span much.

    Differences below ``least``, a power of ten, are noise and not spread out.
    """
    axis = _axis(axes, side)
    low, high = min(*values, 0.0), max(*values, 0.0)
    smallest = min((abs(value) for value in values if value), default=least)
    largest = max(high, -low, least)
    if largest / max(smallest, least) <= SPAN:
        plain(axis, unit)
        room = max(0.12 * (high - low), 1.5 * least)
        axes.set(**{f"{side}lim": (low - room, high + room)})
        return
    top = math.ceil(math.log10(largest))
    bottom = max(math.floor(math.log10(max(smallest, least))), top - DECADES)
    set_scale = axes.set_xscale if side == "x" else axes.set_yscale
    set_scale("symlog", linthresh=10.0**bottom, linscale=0.6)
    powers = [10.0**power for power in range(bottom, top + 1)]
    below = [-power for power in powers if power <= -low]
    axis.set_major_locator(FixedLocator([*below, 0.0, *powers]))
    axis.set_major_formatter(_formatter(unit))
    axis.set_minor_locator(NullLocator())
    room = 0.4 * 10.0**bottom
    axes.set(**{f"{side}lim": (min(2 * low, -room), max(2.2 * high, room))})


def _formatter(unit: str = "") -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.12g}{unit}".replace("-", "−"))


def _axis(axes: Axes, side: str) -> Axis:
    return axes.xaxis if side == "x" else axes.yaxis
