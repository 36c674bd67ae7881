"""Methods that treat each attention site by itself, and so can be kept to some of the layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite

from .base import Decline, Method, MethodOptions, PassResult, Reason, RewriteContext, SitePlan


class LayerwiseOptions(MethodOptions):
    """layers: the layers the method treats, negative ones counted from the last; None for all of them."""

    layers: tuple[int, ...] | None = Field(default=None)

    def select(self, count: int) -> set[int]:
        """Indices of the layers to treat in a model of ``count``; raises ``IndexError`` for one that does not exist."""
        return set(range(count)) if self.layers is None else numbered(self.layers, count)


def numbered(layers: Iterable[int], count: int) -> set[int]:
    """Indices of ``layers``, negative ones counted from the last of ``count``; raises ``IndexError`` for any other."""
    for layer in layers:
        if not -count <= layer < count:
            raise IndexError(f"layer {layer} of {count}")
    return {layer % count for layer in layers}


def refuse_cache(site: AttentionSite, *, sliding: bool) -> Decline | None:
    """Why a site is no causal self-attention over a growing cache; ``sliding``: whether one with a window is one."""
    kind = site.key_cache.kind
    if kind == "static":
        return Decline(site.name, Reason.STATIC_CACHE)
    if kind not in ("fresh", "concatenated", "sliced"):
        return Decline(site.name, Reason.NOT_CAUSAL, f"its cache is {kind}")
    if not sliding and (kind == "sliced" or site.key_cache.window is not None):
        return Decline(site.name, Reason.SLIDING_WINDOW)
    return None


class LayerwiseMethod(Method):
    """Subclasses say which sites they refuse, and what becomes of the others."""

    Options: ClassVar[type[LayerwiseOptions]]
    # Whether it decides in which format tokens are stored.
    stores: ClassVar[bool] = False

    options: LayerwiseOptions

    def apply(self, context: RewriteContext) -> PassResult:
        """Treat every attention site of the chosen layers."""
        sites = context.anatomy.attentions
        try:
            chosen = self.options.select(len(context.anatomy.layers) or len(sites))
        except IndexError as error:
            return self.result([], [Decline("graph", Reason.NO_SUCH_LAYER, str(error))])
        done: list[str] = []
        declines: list[Decline] = []
        for site in sites:
            if (site.index if site.layer is None else site.layer) not in chosen:
                continue
            decline = self.refuse(site)
            if decline is None and self.stores and context.plan(site).is_formatted:
                decline = Decline(site.name, Reason.TWO_FORMATS, f"{self.name} comes second")
            if decline is not None:
                declines.append(decline)
            elif context.fuel.take():
                self.treat(context.plan(site), site)
                done.append(site.name)
        return self.result(done, declines)

    def refuse(self, site: AttentionSite) -> Decline | None:
        """Why ``site`` must stay as it is, or None when it can be treated."""
        raise NotImplementedError

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        """Note in ``plan`` what becomes of ``site``."""
        raise NotImplementedError
