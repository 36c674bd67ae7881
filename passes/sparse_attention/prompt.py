"""Methods that choose which blocks of keys a prompt reads; later tokens read all of the cache."""

from __future__ import annotations

from pydantic import Field
from torchaccel.kernels.prompt_selectors.base import EXPECTED, PromptSelector

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Fidelity, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache


class MassOptions(LayerwiseOptions):
    """density: the share of the causal pairs that lists are thought to hold, by which the cost model sets the number of
    tokens from which they pay; the report tells what they held."""

    density: float = Field(default=EXPECTED, gt=0.0, le=1.0)


class PromptMethod(LayerwiseMethod):
    """Subclasses say which policy chooses at a site.

    Prompts so short that everything would be read, or that the choice would cost more than it saves, are dense.
    """

    family = "sparse_attention"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill"})

    def refuse(self, site: AttentionSite) -> Decline | None:
        causal = site.key_cache.kind == "none" and (site.causal or site.mask is not None)
        return None if causal else refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.selector = self.selector(site)

    def selector(self, site: AttentionSite) -> PromptSelector:
        """Who chooses the blocks of ``site``."""
        raise NotImplementedError
