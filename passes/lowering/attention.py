"""Lowers canonical attention to kernels and turns cache tensors into physical buffers of the rewritten graph."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node
from torchaccel.kernels import ops
from torchaccel.kernels.candidates import unsupported
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.sparse_prompt import SparsePrompt, listed
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat, dtype_name

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.bindings import AppendBinding, StoreBinding
from torchaccel.runtime.eviction import Eviction
from torchaccel.runtime.kv import LogicalKV
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.listing import MostAttended
from torchaccel.runtime.recycling import RecycledSelection
from torchaccel.runtime.selection import Selection

from ..base import Decline, Reason, RewriteContext, SitePlan
from ..retrieving import HOST
from .choice import Chooser
from .choosing import ChoosingLowering
from .gate import Gate, Judgement, retrieving
from .latents import LatentLowering
from .layouts import layouts_of
from .lowered import Lowered, LoweredSite
from .mixed import MixedLowering
from .prompt_outputs import ALL, part_of, prompt_outputs
from .ragged import RaggedLowering, marks_of
from .recycling import RecyclingLowering
from .retrieval import Retrieval
from .rotary import Rotary, find_rotary, pays
from .shared import SharedLowering, unshared_reason
from .signature import Signature
from .site import describe, fake, replace_site, site_shape, size_of, static

# The place of the mass among the results of the operators that have side results.
MASS = 2
# The places of the mass and of the share that was read, among the results of a sparse prompt.
SPARSE_MASS, SHARE = 1, 2


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
        self.rotary = rotary
        self.context = context
        self.chooser = chooser or Chooser(context.device)
        self.gate = Gate(self.chooser, self._spec, gate)
        self.graph: Graph = context.graph
        self.signature = Signature(self.graph, example_inputs)
        self.latents = LatentLowering(self.graph, context.module, self.signature)
        self.retrieval = Retrieval(self.graph, self.signature)
        # Of the sites whose prompts are stored: which of the stores it is.
        self.stores: dict[int, int] = {}
        self.sites: list[LoweredSite] = []
        self.declines: list[Decline] = []
        self.choosing = ChoosingLowering(self.graph, self.chooser, self.gate, self.declines)

    def run(self) -> Lowered:
        """Rewrite the graph in place and return its new signature."""
        ops.library()
        phase = self.context.anatomy.phase
        for site in self.context.anatomy.attentions:
            kind = site.key_cache.kind
            problem = self._problem(site)
            if kind in ("cross", "unknown"):
                continue
            if problem is not None:
                self.declines.append(problem)
                continue
            judged = self._judge(site, self._whole(site, self.context.plan(site)))
            plan, before = judged.plan, len(self.sites)
            if kind == "none":
                self._lower_prompt(site, judged)
            elif kind == "static":
                self._lower_static(site, plan)
            elif site.key_cache.past is None:
                self._lower_prefill(site, judged)
            elif phase in ("decode", "extend"):
                self._lower_append(site, plan)
            for lowered in self.sites[before:]:
                lowered.gate = judged.text
        return Lowered(self.signature.finish(), self.signature.inputs, self.sites, self.declines, self.chooser.compared)

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
            readers = set(cache.full.users) - {site.node, self.graph.output_node(), cache.stored}
            if readers or len(cache.past.users) != 1:
                return Decline(site.name, Reason.SHARED_CACHE, ", ".join(n.name for n in readers))
        if site.key_cache.past is not None and site.causal and static(fake(site.q).shape[2]) != 1:
            return Decline(site.name, Reason.UNALIGNED_CAUSAL)
        return None

    def _spec(self, site: AttentionSite, plan: SitePlan, phase: Any, key: KVFormat, value: KVFormat) -> AttentionSpec:
        mask = "none"
        if site.mask is not None:
            mask = "bool" if fake(site.mask).dtype == torch.bool else "additive"
        return AttentionSpec(
            phase=phase,
            head_dim=site.head_dim,
            group=site.heads // site.kv_heads,
            dtype=dtype_name(site.dtype),
            key_format=key,
            value_format=value,
            scale=float(site.scale),
            causal=site.causal or plan.window is not None,
            softcap=None if site.softcap is None else float(site.softcap),
            mask=mask,  # type: ignore[arg-type]
            window=plan.window,
            sinks=plan.sinks,
            head_windows=plan.window is not None and plan.bound is not None,
        )

    def _lower_static(self, site: AttentionSite, plan: SitePlan) -> None:
        if static(fake(site.q).shape[2]) != 1 or site.mask is None:
            self.sites.append(LoweredSite(site.name, "stock sdpa", "static"))
            return
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        # The mask alone says what is visible: slots that were never written are masked, and skipped unread.
        spec = replace(self._spec(site, plan, "decode", dense, dense), causal=False)
        shape = self._shape(site, size_of(fake(site.k).shape[2]))
        choice = self.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask, choice.key())
        replace_site(self.graph, site, torch.ops.torchaccel.attend_static.default, args)
        self._note(site, choice, shape, "static", plan)

    def _lower_prompt(self, site: AttentionSite, judged: Judgement) -> Node | None:
        """Attention of a prompt over itself: the generated kernel where it wins, stock sdpa elsewhere.

        Returns the attention that every token received, where the plan's policy wants it.
        """
        plan = judged.plan
        device = self.context.device.type
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        mass = plan.eviction is not None and plan.eviction.prompt_mass
        spec = replace(self._spec(site, plan, "prefill", dense, dense), mass=mass)
        if plan.selector is not None:
            reason = unsupported(listed(spec, plan.selector), device)
            if reason is None:
                return self._lower_sparse_prompt(site, judged, spec)
            self.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))
        # Dense prompts from 128 tokens on: ours is 1.7-5.7x stock sdpa on the CPU; on a GPU stock flash kernels win.
        if plan.window is None and not mass and (device != "cpu" or unsupported(spec, device) is not None):
            self.sites.append(LoweredSite(site.name, "stock sdpa", "none"))
            return None
        shape = self._shape(site, size_of(fake(site.k).shape[2]))
        choice = self.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask)
        received = None
        if mass or spec.head_windows:
            target = torch.ops.torchaccel.attend_prompt_with.default
            with_sides = (*args, None, self._bound(site, spec, plan), choice.key())
            (received,) = replace_site(self.graph, site, target, with_sides, MASS)
        else:
            replace_site(self.graph, site, torch.ops.torchaccel.attend_prompt.default, (*args, choice.key()))
        self._note(site, choice, shape, "none", plan)
        return received if mass else None

    def _lower_sparse_prompt(self, site: AttentionSite, judged: Judgement, dense: AttentionSpec) -> Node | None:
        """Attention of a prompt over what its plan's selector chooses of it; returns as ``_lower_prompt``."""
        selector = judged.plan.selector
        assert selector is not None
        shape = self._shape(site, size_of(fake(site.k).shape[2]))
        choice = self.chooser.plan(listed(dense, selector), shape)
        prompt = SparsePrompt(selector, choice, self.chooser.plan(dense, shape), judged.least)
        target = torch.ops.torchaccel.attend_prompt_sparse.default
        args = (site.q, site.k, site.v, site.mask, prompt.key())
        received, share = replace_site(self.graph, site, target, args, SPARSE_MASS, SHARE)
        self.signature.shares.append(self.signature.extra_output(share))
        self._note(site, choice, shape, "none", judged.plan)
        self.sites[-1].selector, self.sites[-1].sparse_from = type(selector).__name__, prompt.switch()
        return received if dense.mass else None

    def _lower_prefill(self, site: AttentionSite, judged: Judgement) -> None:
        plan = judged.plan
        mass = self._lower_prompt(site, judged)
        stored = site.key_cache.stored, site.value_cache.stored
        if stored[0] is None or stored[1] is None:
            return
        tokens = positions_output = None
        key_layout, value_layout = layouts_of(site, plan)
        if plan.keep is not None:
            tokens = self.signature.token_count(self.context.anatomy.query_length)
            positions_output = self.signature.extra_output(plan.keep)
            if tokens is None:
                self.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
                return
        elif plan.dropped:
            tokens = self.signature.token_count(self.context.anatomy.query_length)
        prompt = None
        policy = plan.mixing or plan.eviction or (Eviction() if plan.remembered is not None else None)
        if policy is not None and not plan.dropped:
            if plan.eviction is not None and plan.eviction.ragged and plan.formats is not None:
                self.declines.append(Decline(site.name, Reason.RAGGED_CODES))
            anatomy, extra = self.context.anatomy, self.signature.extra_output
            ids = anatomy.ids if _wants_ids(plan) else None
            prompt = prompt_outputs(self.graph, anatomy, site, policy, mass, ids, extra)
        self.stores[site.index] = len(self.signature.stores)
        self.signature.stores.append(
            StoreBinding(
                self.signature.result(stored[0]),
                self.signature.result(stored[1]),
                key_layout,
                value_layout,
                positions_output,
                tokens,
                prompt,
                self.latents.store(site, (key_layout, value_layout)) if _latent(key_layout, value_layout) else None,
                None if plan.leader is None else self.stores.get(plan.leader),
            )
        )
        self.sites[-1].layout = describe(key_layout)

    def _lower_append(self, site: AttentionSite, plan: SitePlan) -> None:
        keys, values = site.key_cache, site.value_cache
        assert keys.past is not None and values.past is not None
        tokens = self.signature.token_count(self.context.anatomy.query_length)
        stored = keys.stored, values.stored
        if tokens is None or stored[0] is None or stored[1] is None:
            self.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
            return
        arguments = self.signature.argument(keys.past), self.signature.argument(values.past)
        outputs = self.signature.result(stored[0]), self.signature.result(stored[1])
        given = [self.signature.examples[i] for i in arguments]
        if all(isinstance(t, LogicalKV) for t in given):
            layouts = given[0].kv_layout, given[1].kv_layout
        else:
            latent = plan.factors != (None, None)
            needy = isinstance(plan.selection, Selection) and not plan.selection.adopts
            if plan.eviction is not None or plan.mixing is not None or needy or latent:
                self.declines.append(Decline(site.name, Reason.PLAIN_CACHE))
            plan = plan.reading_all() if needy else plan
            formats = None if latent else plan.formats
            layouts = layouts_of(site, replace(plan, eviction=None, mixing=None, formats=formats))
        skipped = plan.dropped or layouts[0].format.kind == "empty"
        spec = self._spec(site, plan, "decode", layouts[0].format, layouts[1].format)
        policy = layouts[0].eviction
        mass = policy is not None and policy.step_mass
        spec = replace(spec, positions=layouts[0].positions, mass=mass)
        unshared = None if skipped else unshared_reason(spec, keys.window, layouts)
        if unshared is not None:
            self.declines.append(Decline(site.name, Reason.UNSHARED_PREFIX, unshared))
            layouts = replace(layouts[0], prefixes=0), replace(layouts[1], prefixes=0)
        self.signature.remove(*outputs)
        binding = AppendBinding(
            *arguments, *outputs, *layouts, tokens, keys.window, layouts[0].positions and not skipped, skipped
        )
        if skipped:
            self.signature.appends.append(binding)
            self.sites.append(LoweredSite(site.name, "skipped", "empty"))
            return
        buffers = [
            self.signature.buffer(past, layout) for past, layout in zip((keys.past, values.past), layouts, strict=True)
        ]
        positions = self.signature.buffer(keys.past, layouts[0], "positions") if spec.positions else None
        if layouts[0].mixing is not None:
            queries = self.signature.extra_output(site.q)
            self.signature.appends.append(replace(binding, queries_output=queries, scale=spec.scale))
            assert positions is not None
            shape = self._shape(site, size_of(fake(keys.past).shape[2]))
            mixed = MixedLowering(self.graph, self.signature, self.chooser)
            choice = mixed.attend(site, spec, [*buffers, positions], layouts, shape)
            self._note(site, choice, shape, describe(layouts[0]), plan)
            return
        if layouts[0].prefixes:
            self.signature.appends.append(binding)
            shape = self._shape(site, size_of(fake(keys.past).shape[2]))
            shared = SharedLowering(self.graph, self.signature, self.chooser)
            choice, of_prefix, text = shared.attend(site, spec, buffers, layouts, shape)
            self._note(site, choice, of_prefix, text, plan)
            return
        if layouts[0].ragged:
            self.signature.appends.append(binding)
            shape = self._shape(site, size_of(fake(keys.past).shape[2]))
            of_heads = RaggedLowering(self.graph, self.signature, self.chooser, self.declines)
            choice = of_heads.attend(site, spec, [*buffers, positions], layouts[0], shape, plan.bound)
            self._note(site, choice, shape, describe(layouts[0]), plan)
            return
        lens = self.signature.placeholder(f"{keys.past.name}_lens", torch.zeros(3, dtype=torch.int64))
        shape = self._shape(site, size_of(fake(keys.past).shape[2]))
        choice = self.chooser.plan(spec, shape)
        args = (site.q, keys.new, values.new, *buffers, lens, site.mask, positions)
        if policy is not None and policy.later_queries:
            # A reader besides attention, so that its kernel does not rotate them: they are wanted rotated.
            with self.graph.inserting_before(self.graph.output_node()):
                asking = part_of(self.graph, site.q, (ALL, ALL, slice(-policy.later_queries, None)))
            binding = replace(binding, queries_output=self.signature.extra_output(asking))
        rotary = False
        sites = len(self.context.anatomy.attentions)
        ids = self.context.anatomy.ids
        least = partial(self.gate.least, site=site, exact=spec, batch=shape.batch, sites=sites)
        step = static(fake(site.q).shape[2]) == 1
        recycles = step and isinstance(layouts[0].selection, RecycledSelection)
        lists = None if recycles else self.retrieval.lists(site, plan.leader, layouts[0], lens, ids, least)
        if _latent(*layouts):
            fresh = self.latents.tokens(site, layouts)
            rebuilding, first = self.latents.rebuilding(site, layouts, lens)
            with_factors = (site.q, *fresh, *args[3:], *rebuilding, choice.key())
            replace_site(self.graph, site, torch.ops.torchaccel.attend_latents.default, with_factors)
            binding = replace(binding, table=first)
        elif recycles:
            recycling = RecyclingLowering(self.retrieval, self.chooser)
            choice, shape = recycling.attend(site, spec, args, layouts[0], shape, least)
        elif lists is not None and step:
            whole, shape = choice, replace(shape, density=lists.policy.share, listed=lists.policy.listed)
            choice = self.chooser.plan(retrieving(spec, lists.policy), shape)
            of_lists = (*args, lists.index, lists.least, choice.key(), whole.key())
            replace_site(self.graph, site, torch.ops.torchaccel.attend_listed.default, of_lists)
        elif (made := self.choosing.attend(site, plan, layouts[0], choice, shape, args)) is not None:
            choice, self.retrieval.made[site.index] = made
        elif mass or spec.head_windows:
            with_sides = (*args, None, self._bound(site, spec, plan), choice.key())
            (received,) = replace_site(self.graph, site, torch.ops.torchaccel.attend_with.default, with_sides, MASS)
            if mass:
                binding = replace(binding, mass_output=self.signature.extra_output(received))
        else:
            rotary = self._attend(site, args, choice)
        evicts = policy is not None and not policy.grows
        if policy is not None and policy.token_ids and ids is not None:
            binding = replace(binding, ids_output=self.signature.extra_output(ids))
        self.signature.appends.append(replace(binding, evicts=evicts, group=spec.group))
        self._note(site, choice, shape, describe(layouts[0]), plan)
        self.sites[-1].rotary = rotary
        if choice.spec.index != "contiguous":
            self.sites[-1].listed, self.sites[-1].listed_share = shape.listed, shape.density or 0.0

    def _attend(self, site: AttentionSite, args: tuple[Any, ...], plan: Plan) -> bool:
        """Attention without side results; returns whether its kernels do the rotary embedding, too."""
        found = self._rotary(site, plan)
        if found is None:
            replace_site(self.graph, site, torch.ops.torchaccel.attend.default, (*args, plan.key()))
            return False
        # Rotating is the same little work for every candidate: what was chosen without holds with it.
        rotated = Plan(replace(plan.spec, rotary=found.style, rotary_dim=found.dim), plan.picks)
        tables = found.cos, found.sin
        args = (found.q, found.k_new, *args[2:], *tables, rotated.key())
        replace_site(self.graph, site, torch.ops.torchaccel.attend_rotary.default, args)
        return True

    def _rotary(self, site: AttentionSite, choice: Plan) -> Rotary | None:
        """The rotary embedding that the kernels of a plan are to do; None where it stays outside."""
        found = find_rotary(site) if self.rotary else None
        if found is None or not pays(found, self.context.device):
            return None
        # Stock operators rotate in a dozen launches, Inductor in one loop.
        generated = all(candidate.implementation in ("cpp", "triton") for _, candidate in choice.picks)
        # Keys for a Gaussian codebook are turned behind the embedding and before the kernel: no launch is saved.
        generated = generated and choice.spec.key_format.codebook == "uniform"
        return found if generated and self.context.fuel.take() else None

    def _bound(self, site: AttentionSite, spec: AttentionSpec, plan: SitePlan) -> Node | None:
        """Which KV heads the window of ``spec`` binds, where it does not bind all."""
        if not spec.head_windows or plan.bound is None:
            return None
        with self.graph.inserting_before(site.node):
            return marks_of(plan.bound, self.graph, self.context.device)

    def _shape(self, site: AttentionSite, tokens: int) -> AttentionShape:
        return site_shape(site, tokens, len(self.context.anatomy.attentions))

    def _note(self, site: AttentionSite, choice: Plan, shape: AttentionShape, layout: str, plan: SitePlan) -> None:
        name = choice.pick(shape.tokens).implementation
        switches = tuple((limit, candidate.key()) for limit, candidate in choice.picks)
        predicted = self.chooser.predicted_ms(choice, shape)
        self.sites.append(
            LoweredSite(site.name, name, layout, plan.window, plan.sinks, switches, predicted, bound=plan.bound)
        )
        reason = unsupported(choice.spec, self.context.device.type)
        if reason is not None:
            self.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))


def _latent(keys: Layout, values: Layout) -> bool:
    """Whether keys or values are stored as latents."""
    return keys.factors is not None or values.factors is not None


def _wants_ids(plan: SitePlan) -> bool:
    return any(policy is not None and policy.token_ids for policy in (plan.eviction, plan.remembered))
