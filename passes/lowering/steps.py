"""Lowers attention of new tokens over a cache: decode steps, and turns of several tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.bindings import AppendBinding
from torchaccel.runtime.kv import LogicalKV
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.recycling import RecycledSelection
from torchaccel.runtime.selection import Selection

from ..base import Decline, Reason, SitePlan
from .choosing import ChoosingLowering
from .draft import Draft
from .gate import Gate, retrieving
from .latents import LatentLowering, latent
from .layouts import layouts_of
from .lowered import LoweredSite
from .mixed import MixedLowering
from .prompt_outputs import ALL, part_of
from .prompts import MASS
from .ragged import RaggedLowering
from .recycling import RecyclingLowering
from .retrieval import Retrieval
from .rotary import Rotary, find_rotary, pays
from .shared import SharedLowering, unshared_reason
from .site import describe, fake, replace_site, size_of, static


class StepLowering:
    """Puts kernels in the place of attention over a cache, and binds the cache's storage."""

    def __init__(self, draft: Draft, latents: LatentLowering, gate: Gate, rotary: bool):
        """rotary: let the kernels embed queries and keys, too."""
        self.draft = draft
        self.latents = latents
        self.gate = gate
        self.rotary = rotary
        self.retrieval = Retrieval(draft.graph, draft.signature)
        self.choosing = ChoosingLowering(draft.graph, draft.chooser, gate, draft.declines)

    def lower(self, site: AttentionSite, plan: SitePlan) -> None:
        """Lower one site under its plan; of caches that were stored before, their layouts say how."""
        keys, values, signature = site.key_cache, site.value_cache, self.draft.signature
        assert keys.past is not None and values.past is not None
        tokens = signature.token_count(self.draft.context.anatomy.query_length)
        if tokens is None or keys.stored is None or values.stored is None:
            self.draft.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
            return
        arguments = signature.argument(keys.past), signature.argument(values.past)
        outputs = signature.result(keys.stored), signature.result(values.stored)
        layouts, plan = self._layouts(site, plan, [signature.examples[i] for i in arguments])
        skipped = plan.dropped or layouts[0].format.kind == "empty"
        policy = layouts[0].eviction
        spec = replace(
            self.draft.spec(site, plan, "decode", layouts[0].format, layouts[1].format),
            positions=layouts[0].positions,
            mass=policy is not None and policy.step_mass,
        )
        unshared = None if skipped else unshared_reason(spec, keys.window, layouts)
        if unshared is not None:
            self.draft.declines.append(Decline(site.name, Reason.UNSHARED_PREFIX, unshared))
            layouts = replace(layouts[0], prefixes=0), replace(layouts[1], prefixes=0)
        signature.remove(*outputs)
        binding = AppendBinding(
            *arguments, *outputs, *layouts, tokens, keys.window, layouts[0].positions and not skipped, skipped
        )
        if skipped:
            signature.appends.append(binding)
            self.draft.sites.append(LoweredSite(site.name, "skipped", "empty"))
            return
        buffers: list[Any] = [signature.buffer(keys.past, layouts[0]), signature.buffer(values.past, layouts[1])]
        buffers.append(signature.buffer(keys.past, layouts[0], "positions") if spec.positions else None)
        shape = self.draft.shape(site, size_of(fake(keys.past).shape[2]))
        text = describe(layouts[0])
        if layouts[0].mixing is not None:
            binding = replace(binding, queries_output=signature.extra_output(site.q), scale=spec.scale)
            mixed = MixedLowering(self.draft.graph, signature, self.draft.chooser)
            choice = mixed.attend(site, spec, buffers, layouts, shape)
        elif layouts[0].prefixes:
            shared = SharedLowering(self.draft.graph, signature, self.draft.chooser)
            choice, shape, text = shared.attend(site, spec, buffers[:2], layouts, shape)
        elif layouts[0].ragged:
            of_heads = RaggedLowering(self.draft.graph, signature, self.draft.chooser, self.draft.declines)
            choice = of_heads.attend(site, spec, buffers, layouts[0], shape, plan.bound)
        else:
            self._lower_buffer(site, plan, spec, buffers, shape, binding)
            return
        signature.appends.append(binding)
        self.draft.note(site, choice, shape, text, plan)

    def _layouts(self, site: AttentionSite, plan: SitePlan, given: list[Any]) -> tuple[tuple[Layout, Layout], SitePlan]:
        """The layouts of the ``given`` caches, or those that plain ones get, and what remains of the plan."""
        if all(isinstance(t, LogicalKV) for t in given):
            return (given[0].kv_layout, given[1].kv_layout), plan
        has_latents = plan.factors != (None, None)
        needy = isinstance(plan.selection, Selection) and not plan.selection.adopts
        if plan.eviction is not None or plan.mixing is not None or needy or has_latents:
            self.draft.declines.append(Decline(site.name, Reason.PLAIN_CACHE))
        plan = plan.reading_all() if needy else plan
        formats = None if has_latents else plan.formats
        return layouts_of(site, replace(plan, eviction=None, mixing=None, formats=formats)), plan

    def _lower_buffer(
        self,
        site: AttentionSite,
        plan: SitePlan,
        spec: AttentionSpec,
        buffers: list[Any],
        shape: AttentionShape,
        binding: AppendBinding,
    ) -> None:
        """Lower a site whose cache is one buffer for keys and one for values; buffers: these, and positions."""
        keys, values, signature = site.key_cache, site.value_cache, self.draft.signature
        layouts, anatomy = (binding.key_layout, binding.value_layout), self.draft.context.anatomy
        assert keys.past is not None
        lens = signature.placeholder(f"{keys.past.name}_lens", torch.zeros(3, dtype=torch.int64))
        choice = self.draft.chooser.plan(spec, shape)
        args = (site.q, keys.new, values.new, *buffers[:2], lens, site.mask, buffers[2])
        policy = layouts[0].eviction
        if policy is not None and policy.later_queries:
            # A reader besides attention, so that its kernel does not rotate them: they are wanted rotated.
            with self.draft.graph.inserting_before(self.draft.graph.output_node()):
                asking = part_of(self.draft.graph, site.q, (ALL, ALL, slice(-policy.later_queries, None)))
            binding = replace(binding, queries_output=signature.extra_output(asking))
        rotary = False
        least = partial(self.gate.least, site=site, exact=spec, batch=shape.batch, sites=len(anatomy.attentions))
        step = static(fake(site.q).shape[2]) == 1
        recycles = step and isinstance(layouts[0].selection, RecycledSelection)
        lists = None if recycles else self.retrieval.lists(site, plan.leader, layouts[0], lens, anatomy.ids, least)
        if lists is None and plan.leader in self.retrieval.made:
            self.draft.declines.append(Decline(site.name, Reason.MOVED_TOKENS))
        if latent(*layouts):
            fresh = self.latents.tokens(site, layouts)
            rebuilding, first = self.latents.rebuilding(site, layouts, lens)
            with_factors = (site.q, *fresh, *args[3:], *rebuilding, choice.key())
            replace_site(self.draft.graph, site, torch.ops.torchaccel.attend_latents.default, with_factors)
            binding = replace(binding, table=first)
        elif recycles:
            recycling = RecyclingLowering(self.retrieval, self.draft.chooser)
            choice, shape = recycling.attend(site, spec, args, layouts[0], shape, least)
        elif lists is not None and step:
            whole, shape = choice, replace(shape, density=lists.policy.share, listed=lists.policy.listed)
            choice = self.draft.chooser.plan(retrieving(spec, lists.policy), shape)
            of_lists = (*args, lists.index, lists.least, choice.key(), whole.key())
            replace_site(self.draft.graph, site, torch.ops.torchaccel.attend_listed.default, of_lists)
        elif (made := self.choosing.attend(site, plan, layouts[0], choice, shape, args)) is not None:
            choice, self.retrieval.made[site.index] = made
        elif spec.mass or spec.head_windows:
            with_sides = (*args, None, self.draft.bound(site, spec, plan), choice.key())
            target = torch.ops.torchaccel.attend_with.default
            (received,) = replace_site(self.draft.graph, site, target, with_sides, MASS)
            if spec.mass:
                binding = replace(binding, mass_output=signature.extra_output(received))
        else:
            rotary = self._attend(site, args, choice)
        evicts = policy is not None and not policy.grows
        if policy is not None and policy.token_ids and anatomy.ids is not None:
            binding = replace(binding, ids_output=signature.extra_output(anatomy.ids))
        signature.appends.append(replace(binding, evicts=evicts, group=spec.group))
        self.draft.note(site, choice, shape, describe(layouts[0]), plan)
        self.draft.sites[-1].rotary = rotary
        if choice.spec.index != "contiguous":
            self.draft.sites[-1].listed, self.draft.sites[-1].listed_share = shape.listed, shape.density or 0.0

    def _attend(self, site: AttentionSite, args: tuple[Any, ...], plan: Plan) -> bool:
        """Attention without side results; returns whether its kernels do the rotary embedding, too."""
        found = self._rotary(site, plan)
        if found is None:
            replace_site(self.draft.graph, site, torch.ops.torchaccel.attend.default, (*args, plan.key()))
            return False
        # Rotating is the same little work for every candidate: what was chosen without holds with it.
        rotated = Plan(replace(plan.spec, rotary=found.style, rotary_dim=found.dim), plan.picks)
        tables = found.cos, found.sin
        args = (found.q, found.k_new, *args[2:], *tables, rotated.key())
        replace_site(self.draft.graph, site, torch.ops.torchaccel.attend_rotary.default, args)
        return True

    def _rotary(self, site: AttentionSite, choice: Plan) -> Rotary | None:
        """The rotary embedding that the kernels of a plan are to do; None where it stays outside."""
        found = find_rotary(site) if self.rotary else None
        if found is None or not pays(found, self.draft.context.device):
            return None
        # Stock operators rotate in a dozen launches, Inductor in one loop.
        generated = all(candidate.implementation in ("cpp", "triton") for _, candidate in choice.picks)
        # Keys for a Gaussian codebook are turned behind the embedding and before the kernel: no launch is saved.
        generated = generated and choice.spec.key_format.codebook == "uniform"
        return found if generated and self.draft.context.fuel.take() else None
