"""Lowers canonical attention to kernels and turns cache tensors into physical buffers of the rewritten graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torchaccel.kernels import ops
from torchaccel.kernels.spec import DTYPES, KVFormat, dtype_name

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.kv import LogicalKV
from torchaccel.runtime.listing import MostAttended

from ..base import Decline, Reason, RewriteContext, SitePlan
from ..retrieving import HOST
from .choice import Chooser
from .draft import Draft
from .gate import Gate, Judgement
from .latents import LatentLowering
from .lowered import Lowered, LoweredSite
from .prompts import PromptLowering
from .site import fake, replace_site, size_of, static
from .steps import StepLowering


class AttentionLowering:
    """Lowers every site of one graph; a site that cannot be lowered stays canonical and exact."""

    def __init__(
        self,
        context: RewriteContext,
        example_inputs: list[Any],
        chooser: Chooser | None = None,
        *,
        gate: bool = True,
        rotary: bool = False,
    ):
        """chooser: which candidates the kernels are; by default every kernel's seed. gate: decline what is slower.

        rotary: let the kernels embed queries and keys, too.
        """
        self.context = context
        self.draft = Draft(context, example_inputs, chooser or Chooser(context.device))
        self.declines = self.draft.declines
        self.gate = Gate(self.draft.chooser, self.draft.spec, gate)
        latents = LatentLowering(context.graph, context.module, self.draft.signature)
        self.prompts = PromptLowering(self.draft, latents)
        self.steps = StepLowering(self.draft, latents, self.gate, rotary)

    def run(self) -> Lowered:
        """Rewrite the graph in place and return its new signature."""
        ops.library()
        phase, sites = self.context.anatomy.phase, self.draft.sites
        for site in self.context.anatomy.attentions:
            kind = site.key_cache.kind
            problem = self._problem(site)
            if kind in ("cross", "unknown"):
                continue
            if problem is not None:
                self.declines.append(problem)
                continue
            judged = self._judge(site, self._whole(site, self.context.plan(site)))
            plan, before = judged.plan, len(sites)
            if kind == "none":
                self.prompts.attend(site, judged)
            elif kind == "static":
                self._lower_static(site, plan)
            elif site.key_cache.past is None:
                self.prompts.store(site, judged)
            elif phase in ("decode", "extend"):
                self.steps.lower(site, plan)
            for lowered in sites[before:]:
                lowered.gate = judged.text
        signature = self.draft.signature
        return Lowered(signature.finish(), signature.inputs, sites, self.declines, self.draft.chooser.compared)

    def _whole(self, site: AttentionSite, plan: SitePlan) -> SitePlan:
        """The plan, without what needs all tokens where some are not stored, or plain ones where they are not."""
        latent = plan.factors != (None, None)
        ragged = plan.eviction is not None and plan.eviction.ragged
        if plan.selection is not None and (latent or ragged or plan.mixing is not None):
            self.declines.append(Decline(site.name, Reason.NEEDS_PLAIN_TOKENS))
            plan = replace(plan.reading_all(), leader=None)
        if isinstance(plan.selection, MostAttended) and (plan.eviction is not None or plan.keep is not None):
            self.declines.append(Decline(site.name, Reason.MOVED_TOKENS))
            plan = replace(plan.reading_all(), leader=None)
        lists = plan.selection is not None or plan.leader is not None or plan.selector is not None
        if plan.bound is not None and (latent or lists or plan.mixing is not None):
            self.declines.append(Decline(site.name, Reason.BOUND_HEADS))
            plan = replace(plan, window=None, sinks=0, bound=None)
        if plan.offload == HOST and (self.context.device.type == "cpu" or plan.formats is not None):
            already = self.context.device.type == "cpu"
            self.declines.append(Decline(site.name, Reason.HOST_ALREADY if already else Reason.HOST_CODES))
            plan = replace(plan, offload=None)
        if (not latent and plan.mixing is None) or (plan.eviction is None and plan.keep is None):
            return plan
        self.declines.append(Decline(site.name, Reason.PRUNED_LATENTS if latent else Reason.PRUNED_CLASSES))
        return replace(plan, formats=None, factors=(None, None), mixing=None)

    def _judge(self, site: AttentionSite, plan: SitePlan) -> Judgement:
        past = site.key_cache.past
        if past is not None and isinstance(plan.selection, MostAttended):
            # Nothing is stored for it: it is judged when the step's kernels are chosen.
            judged = self._judge(site, replace(plan, selection=None))
            return replace(judged, plan=replace(judged.plan, selection=plan.selection))
        if past is not None and isinstance(fake(past), LogicalKV):
            plan = replace(plan.reading_all(), formats=None)  # they were judged when the cache was made
        if plan.selection is not None and plan.eviction is not None and not plan.eviction.grows:
            self.declines.append(Decline(site.name, Reason.EVICTING_STEPS, type(plan.eviction).__name__))
            plan = plan.reading_all()
        if plan.formats is None and plan.window is None and plan.selection is None and plan.selector is None:
            return Judgement(plan, (), "")
        batch = size_of(fake(site.q).shape[0])
        judged = self.gate.judge(site, plan, self.context.anatomy.phase, batch, len(self.context.anatomy.attentions))
        self.declines += judged.declines
        return judged

    def _problem(self, site: AttentionSite) -> Decline | None:
        if site.dtype not in DTYPES.values():
            return Decline(site.name, Reason.UNSUPPORTED_DTYPE, str(site.dtype))
        if fake(site.k).shape[3] != fake(site.v).shape[3] or fake(site.q).shape[3] != site.head_dim:
            return Decline(site.name, Reason.UNEQUAL_HEAD_DIMS)
        for cache in (site.key_cache, site.value_cache):
            if cache.past is None or cache.kind == "static":
                continue
            readers = set(cache.full.users) - {site.node, self.context.graph.output_node(), cache.stored}
            if readers or len(cache.past.users) != 1:
                return Decline(site.name, Reason.SHARED_CACHE, ", ".join(n.name for n in readers))
        if site.key_cache.past is not None and site.causal and static(fake(site.q).shape[2]) != 1:
            return Decline(site.name, Reason.UNALIGNED_CAUSAL)
        return None

    def _lower_static(self, site: AttentionSite, plan: SitePlan) -> None:
        if static(fake(site.q).shape[2]) != 1 or site.mask is None:
            self.draft.sites.append(LoweredSite(site.name, "stock sdpa", "static"))
            return
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        # The mask alone says what is visible: slots that were never written are masked, and skipped unread.
        spec = replace(self.draft.spec(site, plan, "decode", dense, dense), causal=False)
        shape = self.draft.shape(site, size_of(fake(site.k).shape[2]))
        choice = self.draft.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask, choice.key())
        replace_site(self.draft.graph, site, torch.ops.torchaccel.attend_static.default, args)
        self.draft.note(site, choice, shape, "static", plan)
