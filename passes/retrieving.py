"""What all methods share that store every token and read some of them: the layers that stay dense."""

from __future__ import annotations

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.selection import Selection

from .base import Decline, Fidelity, SitePlan
from .layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache


class RetrievingOptions(LayerwiseOptions):
    """dense_layers: first layers that read everything, unless ``layers`` names the ones to treat."""

    dense_layers: int = Field(default=2, ge=0)

    def select(self, count: int) -> set[int]:
        chosen = super().select(count)
        return chosen if self.layers is not None else chosen - set(range(self.dense_layers))


class RetrievingMethod(LayerwiseMethod):
    """Subclasses give the policy that chooses what a decode step reads; prompts, and several new tokens, read all."""

    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})

    options: RetrievingOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        return refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.selection = self.policy(site)

    def policy(self, site: AttentionSite) -> Selection:
        """The policy of a site."""
        raise NotImplementedError
