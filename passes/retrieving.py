"""What all methods share that store every token and read some of them: the layers that stay dense."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.listing import Listing

from .base import Decline, Fidelity, Phase, SitePlan
from .layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache
from .offloading import folder

# As the option offload: the memory of the host.
HOST = "host"


class RetrievingOptions(LayerwiseOptions):
    """dense_layers: first layers that read everything, unless ``layers`` names the ones to treat. offload: a folder;
    the tokens of the other layers lie in files there, of which steps read what they list; "host" for the memory of the
    host, from which a GPU is sent what it lists."""

    dense_layers: int = Field(default=2, ge=0)
    offload: str | None = Field(default=None)

    @field_validator("offload")
    @classmethod
    def _folder(cls, offload: str | None) -> str | None:
        return offload if offload == HOST else folder(offload)

    def select(self, count: int) -> set[int]:
        chosen = super().select(count)
        return chosen if self.layers is not None else chosen - set(range(self.dense_layers))


class RetrievingMethod(LayerwiseMethod):
    """Subclasses give the policy that chooses what a decode step reads; several new tokens read all.

    sparse_prompts: whether prompts read less, too.
    """

    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    sparse_prompts: ClassVar[bool] = False

    options: RetrievingOptions

    def sparse_in(self, graphs: frozenset[Phase]) -> bool:
        return self.sparse_prompts or "decode" in graphs

    def keep_to(self, phase: str, graphs: frozenset[Phase]) -> None:
        if phase == "decode":
            self.phase = phase  # prompts are treated as well: what they store carries the state that steps choose by
        else:
            super().keep_to(phase, graphs)

    def refuse(self, site: AttentionSite) -> Decline | None:
        return refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.selection, plan.offload = self.policy(site), self.options.offload

    def policy(self, site: AttentionSite) -> Listing:
        """What the lists of a site are."""
        raise NotImplementedError
