"""Which layers a method must spare: the loss when it is applied to one layer alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes

from .documents import Document, Row, number, sequence, text
from .drawing import Plot, finish, new_figure
from .numerals import significant
from .palette import Look, Looks, short, stand_in
from .scales import plain

LABELS = {"kl": "KL, nats per token", "perplexity_ratio": "perplexity ratio"}
PANEL = 130
LONGEST = 20


@dataclass(frozen=True)
class Profile:
    """The loss called ``metric`` for each of ``layers``."""

    row: Row
    metric: str
    layers: list[int]
    losses: list[float]


def layer_sensitivity(document: Document, looks: Looks) -> Iterator[Plot]:
    """One plot per metric, with bars for each variant."""
    profiles = [profile for row in document.rows if row.ran and (profile := _profile(row)) is not None]
    for order, metric in enumerate(dict.fromkeys(profile.metric for profile in profiles)):
        found = [profile for profile in profiles if profile.metric == metric]
        figure = new_figure(40 + PANEL * len(found))
        panels = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
        for axes, profile in zip(panels, found, strict=True):
            _bars(axes, profile, looks.of(profile.row))
        panels[-1].set_xlabel("layer")
        figure.supylabel(short(LABELS.get(metric, metric), LONGEST), fontsize=10.5, color=stand_in("muted"))
        caption = (
            "Higher bars are layers that the method harms more when it is applied to them alone: "
            "candidates to leave untouched; the reference is float32 eager."
        )
        words = "; ".join(_words(profile) for profile in found)
        yield finish(figure, f"d{document.index}-layers-{order}", "Sensitivity of each layer", caption, words)


def _profile(row: Row) -> Profile | None:
    details = row.record.get("details")
    metric = text(details, "sensitivity", "metric") or "kl"
    pairs = [(number(r, "layer"), number(r, metric)) for r in sequence(details, "sensitivity", "layers")]
    known = [(int(layer), loss) for layer, loss in pairs if layer is not None and loss is not None]
    return Profile(row, metric, [layer for layer, _ in known], [loss for _, loss in known]) if known else None


def _bars(axes: Axes, profile: Profile, look: Look) -> None:
    neutral = 1.0 if profile.metric == "perplexity_ratio" else 0.0
    heights = [loss - neutral for loss in profile.losses]
    axes.bar(profile.layers, heights, bottom=neutral, width=0.72, color=look.colour)
    axes.axhline(neutral, color=stand_in("muted"), linewidth=1)
    axes.set_title(look.label, loc="left", color=stand_in("ink"))
    axes.grid(visible=False, axis="x")
    plain(axes.xaxis, whole=True)
    axes.set_xlim(min(profile.layers) - 0.7, max(profile.layers) + 0.7)
    plain(axes.yaxis)


def _words(profile: Profile) -> str:
    losses = ", ".join(
        f"{layer}: {significant(loss)}" for layer, loss in zip(profile.layers, profile.losses, strict=True)
    )
    return f"{profile.row.variant}, by layer {losses}"
