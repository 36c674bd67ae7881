"""From a matplotlib figure to SVG that stands inline in the page."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .palette import stand_in, stand_ins

# One user unit of the SVG is one CSS pixel on a desktop; a phone shows the same drawing at about three quarters.
WIDTH = 480
DPI = 72
# The gid of text that gets a halo of the surface's colour, so that it can stand on a line.
HALO = "halo"
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
FONT = re.compile(r"font: (?:(\d+) )?([\d.]+)px [^;]*")
COLOUR = re.compile("#[0-9a-f]{6}")


@dataclass(frozen=True)
class Plot:
    """A drawing with its name in the document, its title and the sentence that says what to read from it."""

    name: str
    title: str
    caption: str
    svg: Markup


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """matplotlib's defaults with the report's style, whatever the user has configured; restored afterwards."""
    ink, muted = stand_in("ink"), stand_in("muted")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.facecolor": "none",
                "savefig.facecolor": "none",
                "axes.facecolor": "none",
                "axes.edgecolor": stand_in("grid"),
                "axes.labelcolor": muted,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "grid.color": stand_in("grid"),
                "grid.linewidth": 0.8,
                "text.color": ink,
                "text.parse_math": False,
                "axes.formatter.use_mathtext": False,
                "xtick.color": stand_in("grid"),
                "ytick.color": stand_in("grid"),
                "xtick.major.pad": 5.5,
                "xtick.labelcolor": muted,
                "ytick.labelcolor": muted,
                "font.family": "DejaVu Sans",
                "font.size": 10.5,
                "axes.labelsize": 10.5,
                "axes.titlesize": 10.5,
                "xtick.labelsize": 10,
                "ytick.labelsize": 10,
                "legend.fontsize": 10,
                "legend.frameon": False,
                "svg.fonttype": "none",
                "svg.hashsalt": "torchaccel",
            }
        )
        yield


def new_figure(height: float) -> Figure:
    """A figure of the report's width and ``height`` CSS pixels that lays itself out."""
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes."""
    figure = new_figure(height)
    return figure, figure.add_subplot()


def finish(figure: Figure, name: str, title: str, caption: str, description: str) -> Plot:
    """Draw ``figure``; ``description`` puts its numbers into words for those who cannot see it.

    ``name`` is unique on the page: it starts every id in the drawing.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    # Without the metadata there is no date, and equal documents give equal bytes; the style would rule the whole page.
    for part in ("metadata", "defs"):
        for child in root.findall(f"{SVG}{part}"):
            if part == "metadata" or child.find(f"{SVG}style") is not None:
                root.remove(child)
    linked = _linked_ids(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = {key: value for key, value in _attributes(element, name, linked)}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for position, (tag, words) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(tag, id=f"{name}-{tag}")
        child.text = words
        root.insert(position, child)
    return Plot(name, title, caption, Markup(ElementTree.tostring(root, encoding="unicode")))


def _linked_ids(root: ElementTree.Element) -> set[str]:
    """The ids that something in the drawing refers to; the others are of no use."""
    values = [value for element in root.iter() for value in element.attrib.values()]
    return {target for value in values for target in re.findall(r"(?:^#|url\(#)([^)]+)", value)}


def _attributes(element: ElementTree.Element, name: str, linked: set[str]) -> Iterator[tuple[str, str]]:
    """The attributes of ``element`` with ids of the page's, fonts of the page's and colours of the scheme's."""
    colours = stand_ins()
    for key, value in element.attrib.items():
        if key == "id":
            if value == HALO:
                yield "class", HALO
            elif value in linked:
                yield key, f"{name}-{value}"
        elif key == LINK:
            yield "href", value.replace("#", f"#{name}-", 1)
        elif key == "style":
            value = FONT.sub(lambda font: f"font-size: {font[2]}px; font-weight: {font[1] or 400}", value)
            yield key, COLOUR.sub(lambda colour: colours.get(colour[0], colour[0]), value)
        else:
            yield key, value.replace("url(#", f"url(#{name}-")
