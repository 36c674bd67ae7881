"""The colours and markers of the report, safe for the colour-blind, in a light and a dark scheme.

Plots are drawn with one stand-in colour per role, which ``svg.py`` turns into the role's CSS variable; so the page
decides, and one drawing serves both schemes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .documents import PREFIX, Document, Row

# role: (light, dark). The series follow Okabe and Ito, darkened or lightened to 3:1 against the surface.
ROLES = {
    "surface": ("#ffffff", "#16191d"),
    "ink": ("#1c2127", "#e8eaed"),
    "muted": ("#5b6570", "#a3acb7"),
    "grid": ("#e3e7eb", "#2c3239"),
    "baseline": ("#7a838d", "#949da7"),
    "series-1": ("#0072b2", "#4aa8e0"),
    "series-2": ("#c65102", "#ff8f4a"),
    "series-3": ("#00805c", "#2fc79a"),
    "series-4": ("#b14a86", "#ea9ac8"),
    "series-5": ("#9a6a00", "#e9b83a"),
    "series-6": ("#5a4fcf", "#a9a2ff"),
    "on-series": ("#ffffff", "#0d1013"),
}
SERIES = 6
MARKERS = "osD^vPX"
BASELINE_MARKERS = "shpd<>8"
LONGEST = 30


@dataclass(frozen=True)
class Look:
    """How a variant looks in every plot: label, matplotlib colour and marker; baselines are hollow and grey."""

    label: str
    colour: str
    marker: str
    hollow: bool

    @property
    def face(self) -> str:
        return stand_in("surface") if self.hollow else self.colour


def stand_in(role: str) -> str:
    """The colour that stands for ``role`` in a drawing."""
    return f"#0a0b{list(ROLES).index(role):02x}"


def stand_ins() -> dict[str, str]:
    """Stand-in colour -> CSS value."""
    return {stand_in(role): f"var(--{role})" for role in ROLES}


class Looks:
    """The look of every variant of some documents, the same in all plots of the page."""

    def __init__(self, documents: Sequence[Document]) -> None:
        variants = list(dict.fromkeys(row.variant for document in documents for row in document.rows))
        self._looks: dict[str, Look] = {}
        for turn, name in enumerate(name for name in variants if name.startswith(PREFIX)):
            colour = stand_in(f"series-{turn % SERIES + 1}")
            self._looks[name] = Look(short(name), colour, MARKERS[turn % len(MARKERS)], hollow=False)
        for turn, name in enumerate(name for name in variants if not name.startswith(PREFIX)):
            marker = BASELINE_MARKERS[turn % len(BASELINE_MARKERS)]
            self._looks[name] = Look(short(name), stand_in("baseline"), marker, hollow=True)

    def of(self, row: Row) -> Look:
        """The look of ``row``; its label says so when it did not run as asked."""
        look = self._looks[row.variant]
        return look if row.ok else replace(look, label=f"{look.label} ({row.status})")


def short(variant: str, room: int = LONGEST) -> str:
    """The name for a plot with ``room`` characters: without torchaccel's prefix, a long one without its middle."""
    name = " ".join(variant.removeprefix(PREFIX).split())
    tail = room // 3
    return name if len(name) <= room else f"{name[: room - tail - 1]}…{name[-tail:]}"
