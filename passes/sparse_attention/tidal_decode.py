"""TidalDecode: two layers attend to everything, and those behind read what they attended to most."""

from __future__ import annotations

from pydantic import Field

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.listing import MostAttended

from ..base import Decline, PassResult, Reason, RewriteContext
from ..layerwise import numbered
from ..retrieving import RetrievingMethod, RetrievingOptions

# The publication chooses again in layer 13 of 32 (Llama 3 8B), 31 or 14 of 80, 12 of 28 and 7 of 32 (Llama 2 7B).
DEPTH = 2 / 5


class TidalDecodeOptions(RetrievingOptions):
    """tokens: that a step reads, its own included. reselect: layers that choose anew, besides the first one that is
    treated; negative ones count from the last, and without any named it is one at two fifths of the depth."""

    tokens: int = Field(default=1024, ge=2)
    reselect: tuple[int, ...] | None = None


class TidalDecode(RetrievingMethod):
    """The first treated layer, and those of ``reselect``, attend to everything; the others read the tokens that the
    last of these attended to most in the same step: for each KV head, by the sum over its query heads.

    Nothing is remembered between steps. Layers with other KV heads than the last that chose choose for themselves.
    """

    name = "tidal_decode"
    family = "sparse_attention"
    paper = "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (2024)"
    Options = TidalDecodeOptions

    options: TidalDecodeOptions

    def apply(self, context: RewriteContext) -> PassResult:
        """Treat the layers, and note whose choice each of them reads by."""
        sites = context.anatomy.attentions
        count = len(context.anatomy.layers) or len(sites)
        named = self.options.reselect
        try:
            again = {round(DEPTH * count)} if named is None else numbered(named, count)
        except IndexError as error:
            return self.result([], [Decline("graph", Reason.NO_SUCH_LAYER, str(error))])
        result = super().apply(context)
        leader: AttentionSite | None = None
        for site in sites:
            plan = context.plan(site)
            if not isinstance(plan.selection, MostAttended):
                continue
            layer = site.index if site.layer is None else site.layer
            if leader is None or layer in again or (site.heads, site.kv_heads) != (leader.heads, leader.kv_heads):
                leader, plan.offload = site, None
            else:
                plan.leader = leader.index
        return result

    def policy(self, site: AttentionSite) -> MostAttended:
        return MostAttended(self.options.tokens)
