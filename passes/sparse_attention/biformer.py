"""BiFormer: every region of an image attends to the few regions that a graph between their means leads to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from torchaccel.kernels.prompt_selectors.regions import RoutedRegions

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.nodes import hint, sizes
from torchaccel.graph.patches import find_patches

from ..base import Decline, Fidelity, Reason, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions


class BiFormerOptions(LayerwiseOptions):
    """topk: regions that each region reads. region: patches along the side of a region.

    grid: rows and columns of patches; without it they are those that the graph cuts images into. prefix: tokens before
    the patches; without it all that are no patches.
    """

    topk: int = Field(default=8, ge=1)
    region: Literal[4, 8, 16] = 8
    grid: tuple[PositiveInt, PositiveInt] | None = None
    prefix: int | None = Field(default=None, ge=0)


class BiFormer(LayerwiseMethod):
    """Bi-level routing attention in the encoder's own attention layers, without its convolution of the values."""

    name = "biformer"
    aliases = ("bra",)
    family = "sparse_attention"
    fidelity = Fidelity.APPROX
    phases = frozenset({"encoder"})
    paper = "BiFormer: Vision Transformer with Bi-Level Routing Attention (2023)"
    Options = BiFormerOptions

    options: BiFormerOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        if site.causal or site.key_cache.kind != "none":
            return Decline(site.name, Reason.NOT_BIDIRECTIONAL)
        if site.mask is not None:
            return Decline(site.name, Reason.NO_PATCHES, "they have a mask, as padded text, or a bias")
        grid = self.options.grid or _patches(site)
        if grid is None:
            return Decline(site.name, Reason.NO_PATCHES, "no convolution cuts images into patches before it; give grid")
        tokens = hint(sizes(site.q)[2])
        if tokens is None or RoutedRegions(1, prefix=self.options.prefix, grid=grid).layout(tokens) is None:
            found = f"{tokens} tokens, patches in {grid[0]} rows and {grid[1]} columns; give grid and prefix"
            return Decline(site.name, Reason.NO_PATCHES, found)
        return None

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        asked = self.options
        plan.selector, plan.grid = RoutedRegions(asked.region**2, asked.topk, asked.prefix), asked.grid


def _patches(site: AttentionSite) -> tuple[int, int] | None:
    """Rows and columns of patches that were seen when the graph was captured."""
    node = find_patches(site.q)
    rows, columns = (None, None) if node is None else map(hint, sizes(node)[2:])
    return None if rows is None or columns is None else (rows, columns)
