"""Lowers attention of prompts and encoders over themselves, and says how a prompt's keys and values are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torchaccel.kernels.candidates import unsupported
from torchaccel.kernels.prompt_selectors.regions import RoutedRegions
from torchaccel.kernels.sparse_prompt import SparsePrompt, listed
from torchaccel.kernels.spec import AttentionSpec, KVFormat, dtype_name

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.patches import find_patches
from torchaccel.runtime.bindings import StoreBinding
from torchaccel.runtime.eviction import Eviction

from ..base import Decline, Reason, SitePlan
from .draft import Draft
from .gate import Judgement
from .latents import LatentLowering, latent
from .layouts import layouts_of
from .lowered import LoweredSite
from .prompt_outputs import prompt_outputs
from .site import describe, fake, replace_site, size_node, size_of

# The place of the mass among the results of attention with side results.
MASS = 2
# The places of the mass and of the share that was read, among the results of a sparse prompt.
SPARSE_MASS, SHARE = 1, 2
# Of the share that attention over regions read.
REGION_SHARE = 1


class PromptLowering:
    """Puts kernels in the place of a prompt's attention, and binds what is stored of it."""

    def __init__(self, draft: Draft, latents: LatentLowering):
        self.draft = draft
        self.latents = latents
        # Of the sites whose prompts are stored: which of the stores it is.
        self.stores: dict[int, int] = {}

    def attend(self, site: AttentionSite, judged: Judgement) -> Node | None:
        """Attention of a prompt over itself: the generated kernel where it wins, stock sdpa elsewhere.

        Returns the attention that every token received, where the plan's policy wants it.
        """
        plan = judged.plan
        device = self.draft.context.device.type
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        mass = plan.eviction is not None and plan.eviction.prompt_mass
        spec = replace(self.draft.spec(site, plan, "prefill", dense, dense), mass=mass)
        if plan.selector is not None:
            reason = unsupported(listed(spec, plan.selector), device)
            if reason is None:
                return self._sparse(site, judged, spec)
            self.draft.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))
        # Dense prompts from 128 tokens on: ours is 1.7-5.7x stock sdpa on the CPU; on a GPU stock flash kernels win.
        if plan.window is None and not mass and (device != "cpu" or unsupported(spec, device) is not None):
            self.draft.sites.append(LoweredSite(site.name, "stock sdpa", "none"))
            return None
        shape = self.draft.shape(site, size_of(fake(site.k).shape[2]))
        choice = self.draft.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask)
        received = None
        if mass or spec.head_windows:
            target = torch.ops.torchaccel.attend_prompt_with.default
            with_sides = (*args, None, self.draft.bound(site, spec, plan), choice.key())
            (received,) = replace_site(self.draft.graph, site, target, with_sides, MASS)
        else:
            replace_site(self.draft.graph, site, torch.ops.torchaccel.attend_prompt.default, (*args, choice.key()))
        self.draft.note(site, choice, shape, "none", plan)
        return received if mass else None

    def _sparse(self, site: AttentionSite, judged: Judgement, dense: AttentionSpec) -> Node | None:
        """Attention of tokens over what their plan's selector chooses of them; returns as ``attend``."""
        selector = judged.plan.selector
        assert selector is not None
        shape = self.draft.shape(site, size_of(fake(site.k).shape[2]))
        choice = self.draft.chooser.plan(listed(dense, selector), shape)
        prompt = SparsePrompt(selector, choice, self.draft.chooser.plan(dense, shape), judged.least)
        received = None
        if isinstance(selector, RoutedRegions):
            regions = (site.q, site.k, site.v, self._grid(site, judged.plan), prompt.key())
            target = torch.ops.torchaccel.attend_regions.default
            (share,) = replace_site(self.draft.graph, site, target, regions, REGION_SHARE)
        else:
            target = torch.ops.torchaccel.attend_prompt_sparse.default
            args = (site.q, site.k, site.v, site.mask, prompt.key())
            received, share = replace_site(self.draft.graph, site, target, args, SPARSE_MASS, SHARE)
        self.draft.signature.shares.append(self.draft.signature.extra_output(share))
        self.draft.note(site, choice, shape, "none", judged.plan)
        self.draft.sites[-1].selector, self.draft.sites[-1].sparse_from = type(selector).__name__, prompt.switch()
        return received if dense.mass else None

    def _grid(self, site: AttentionSite, plan: SitePlan) -> list[Any]:
        """Rows and columns of the patches of ``site``, numbers or nodes."""
        if plan.grid is not None:
            return list(plan.grid)
        patches = find_patches(site.q)
        assert patches is not None
        with self.draft.graph.inserting_before(site.node):
            return [size_node(patches, dim) for dim in (2, 3)]

    def store(self, site: AttentionSite, judged: Judgement) -> None:
        """As ``attend``, with the keys and values put into storage."""
        plan = judged.plan
        mass = self.attend(site, judged)
        stored = site.key_cache.stored, site.value_cache.stored
        if stored[0] is None or stored[1] is None:
            return
        tokens = positions_output = None
        key_layout, value_layout = layouts_of(site, plan)
        if plan.keep is not None:
            tokens = self.draft.signature.token_count(self.draft.context.anatomy.query_length)
            positions_output = self.draft.signature.extra_output(plan.keep)
            if tokens is None:
                self.draft.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
                return
        elif plan.dropped:
            tokens = self.draft.signature.token_count(self.draft.context.anatomy.query_length)
        prompt = None
        policy = plan.mixing or plan.eviction or (Eviction() if plan.remembered is not None else None)
        if policy is not None and not plan.dropped:
            if plan.eviction is not None and plan.eviction.ragged and plan.formats is not None:
                self.draft.declines.append(Decline(site.name, Reason.RAGGED_CODES))
            anatomy, extra = self.draft.context.anatomy, self.draft.signature.extra_output
            ids = anatomy.ids if _wants_ids(plan) else None
            prompt = prompt_outputs(self.draft.graph, anatomy, site, policy, mass, ids, extra)
        self.stores[site.index] = len(self.draft.signature.stores)
        self.draft.signature.stores.append(
            StoreBinding(
                self.draft.signature.result(stored[0]),
                self.draft.signature.result(stored[1]),
                key_layout,
                value_layout,
                positions_output,
                tokens,
                prompt,
                self.latents.store(site, (key_layout, value_layout)) if latent(key_layout, value_layout) else None,
                None if plan.leader is None else self.stores.get(plan.leader),
            )
        )
        self.draft.sites[-1].layout = describe(key_layout)


def _wants_ids(plan: SitePlan) -> bool:
    return any(policy is not None and policy.token_ids for policy in (plan.eviction, plan.remembered))
