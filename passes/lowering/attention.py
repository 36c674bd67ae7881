"""Lowers canonical attention to kernels and turns cache tensors into physical buffers of the rewritten graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torchaccel.kernels import ops, shared_prefix
from torchaccel.kernels.candidates import unsupported
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.sparse_prompt import SparsePrompt, listed
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat, dtype_name

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.bindings import AppendBinding, StoreBinding
from torchaccel.runtime.eviction import Eviction
from torchaccel.runtime.kv import LogicalKV, prefix_names
from torchaccel.runtime.listing import MostAttended
from torchaccel.runtime.selection import Selection
from torchaccel.runtime.storage import Layout

from ..base import Decline, Reason, RewriteContext, SitePlan
from .choice import Chooser
from .gate import Gate, Judgement, retrieving
from .latents import LatentLowering
from .lowered import Lowered, LoweredSite
from .mixed import MixedLowering
from .prompt_outputs import ALL, part_of, prompt_outputs
from .ragged import marks_of, ragged_spec
from .retrieval import Lists, Retrieval
from .rotary import Rotary, find_rotary, pays
from .signature import Signature

# The place of the mass among the results of the operators that have side results.
MASS = 2
# The place of the list among the results of the attention that makes one.
INDEX = 1
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
            plan = replace(plan, selection=None, leader=None)
        if isinstance(plan.selection, MostAttended) and (plan.eviction is not None or plan.keep is not None):
            self.declines.append(Decline(site.name, Reason.MOVED_TOKENS))
            plan = replace(plan, selection=None, leader=None)
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
        if past is not None and isinstance(_fake(past), LogicalKV):
            plan = replace(plan, formats=None, selection=None)  # they were judged when the cache was made
        if plan.selection is not None and plan.eviction is not None and not plan.eviction.grows:
            self.declines.append(Decline(site.name, Reason.EVICTING_STEPS, type(plan.eviction).__name__))
            plan = replace(plan, selection=None)
        if plan.formats is None and plan.window is None and plan.selection is None and plan.selector is None:
            return Judgement(plan, (), "")
        batch = _size(_fake(site.q).shape[0])
        judged = self.gate.judge(site, plan, self.context.anatomy.phase, batch, len(self.context.anatomy.attentions))
        self.declines += judged.declines
        return judged

    def _problem(self, site: AttentionSite) -> Decline | None:
        if site.dtype not in DTYPES.values():
            return Decline(site.name, Reason.UNSUPPORTED_DTYPE, str(site.dtype))
        if _fake(site.k).shape[3] != _fake(site.v).shape[3] or _fake(site.q).shape[3] != site.head_dim:
            return Decline(site.name, Reason.UNEQUAL_HEAD_DIMS)
        for cache in (site.key_cache, site.value_cache):
            if cache.past is None or cache.kind == "static":
                continue
            readers = set(cache.full.users) - {site.node, self.graph.output_node(), cache.stored}
            if readers or len(cache.past.users) != 1:
                return Decline(site.name, Reason.SHARED_CACHE, ", ".join(n.name for n in readers))
        if site.key_cache.past is not None and site.causal and _hint(_fake(site.q).shape[2]) != 1:
            return Decline(site.name, Reason.UNALIGNED_CAUSAL)
        return None

    def _spec(self, site: AttentionSite, plan: SitePlan, phase: Any, key: KVFormat, value: KVFormat) -> AttentionSpec:
        mask = "none"
        if site.mask is not None:
            mask = "bool" if _fake(site.mask).dtype == torch.bool else "additive"
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
        )

    def _layouts(self, site: AttentionSite, plan: SitePlan) -> tuple[Layout, Layout]:
        plain = KVFormat("empty" if plan.dropped else "dense", dtype_name(site.dtype), site.head_dim)
        keys, values = (plain, plain) if plan.dropped or plan.formats is None else plan.formats
        if plan.eviction is not None and plan.eviction.ragged and not plan.dropped:
            keys, values = plain, plain
        mixing = None if plan.dropped else plan.mixing
        some = plan.keep is not None or plan.eviction is not None or mixing is not None
        pruned = some and not plan.dropped
        of_keys, of_values = (
            factors if fmt.kind == "latent" else None for fmt, factors in zip((keys, values), plan.factors, strict=True)
        )
        selection = None if plan.dropped else _remembering(plan)
        both: dict[str, Any] = {"pruned": pruned, "eviction": plan.eviction, "mixing": mixing, "offload": plan.offload}
        return (
            Layout(keys, positions=pruned, selection=selection, factors=of_keys, **both),
            Layout(values, factors=of_values, **both),
        )

    def _lower_static(self, site: AttentionSite, plan: SitePlan) -> None:
        if _hint(_fake(site.q).shape[2]) != 1 or site.mask is None:
            self.sites.append(LoweredSite(site.name, "stock sdpa", "static"))
            return
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        # The mask alone says what is visible: slots that were never written are masked, and skipped unread.
        spec = replace(self._spec(site, plan, "decode", dense, dense), causal=False)
        shape = self._shape(site, _size(_fake(site.k).shape[2]))
        choice = self.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask, choice.key())
        self._replace(site, torch.ops.torchaccel.attend_static.default, args)
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
        shape = self._shape(site, _size(_fake(site.k).shape[2]))
        choice = self.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask)
        received = None
        if mass:
            target = torch.ops.torchaccel.attend_prompt_with.default
            (received,) = self._replace(site, target, (*args, None, None, choice.key()), MASS)
        else:
            self._replace(site, torch.ops.torchaccel.attend_prompt.default, (*args, choice.key()))
        self._note(site, choice, shape, "none", plan)
        return received

    def _lower_sparse_prompt(self, site: AttentionSite, judged: Judgement, dense: AttentionSpec) -> Node | None:
        """Attention of a prompt over what its plan's selector chooses of it; returns as ``_lower_prompt``."""
        selector = judged.plan.selector
        assert selector is not None
        shape = self._shape(site, _size(_fake(site.k).shape[2]))
        choice = self.chooser.plan(listed(dense, selector), shape)
        prompt = SparsePrompt(selector, choice, self.chooser.plan(dense, shape), judged.least)
        target = torch.ops.torchaccel.attend_prompt_sparse.default
        args = (site.q, site.k, site.v, site.mask, prompt.key())
        received, share = self._replace(site, target, args, SPARSE_MASS, SHARE)
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
        key_layout, value_layout = self._layouts(site, plan)
        if plan.keep is not None:
            tokens = self.signature.token_count(self.context.anatomy.query_length)
            positions_output = self.signature.extra_output(plan.keep)
            if tokens is None:
                self.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
                return
        elif plan.dropped:
            tokens = self.signature.token_count(self.context.anatomy.query_length)
        prompt = None
        policy = plan.mixing or plan.eviction or (Eviction() if _remembering(plan) is not None else None)
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
        self.sites[-1].layout = _describe(key_layout)

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
            plan = replace(plan, selection=None) if needy else plan
            formats = None if latent else plan.formats
            layouts = self._layouts(site, replace(plan, eviction=None, mixing=None, formats=formats))
        skipped = plan.dropped or layouts[0].format.kind == "empty"
        spec = self._spec(site, plan, "decode", layouts[0].format, layouts[1].format)
        policy = layouts[0].eviction
        mass = policy is not None and policy.step_mass
        spec = replace(spec, positions=layouts[0].positions, mass=mass)
        unshared = None if skipped else _unshared(spec, keys.window, layouts)
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
            shape = self._shape(site, _size(_fake(keys.past).shape[2]))
            mixed = MixedLowering(self.graph, self.signature, self.chooser)
            choice = mixed.attend(site, spec, [*buffers, positions], layouts, shape)
            self._note(site, choice, shape, _describe(layouts[0]), plan)
            return
        if layouts[0].prefixes:
            self.signature.appends.append(binding)
            self._attend_shared(site, plan, spec, buffers, layouts)
            return
        if layouts[0].ragged:
            self.signature.appends.append(binding)
            self._attend_ragged(site, plan, spec, [*buffers, positions], layouts[0])
            return
        lens = self.signature.placeholder(f"{keys.past.name}_lens", torch.zeros(3, dtype=torch.int64))
        shape = self._shape(site, _size(_fake(keys.past).shape[2]))
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
        least = lambda policy: self.gate.least(site, policy, spec, shape.batch, sites)  # noqa: E731
        lists = self.retrieval.lists(site, plan.leader, layouts[0], lens, ids, least)
        if _latent(*layouts):
            fresh = self.latents.tokens(site, layouts)
            rebuilding, first = self.latents.rebuilding(site, layouts, lens)
            with_factors = (site.q, *fresh, *args[3:], *rebuilding, choice.key())
            self._replace(site, torch.ops.torchaccel.attend_latents.default, with_factors)
            binding = replace(binding, table=first)
        elif lists is not None and _hint(_fake(site.q).shape[2]) == 1:
            whole, shape = choice, replace(shape, density=lists.policy.share, listed=lists.policy.listed)
            choice = self.chooser.plan(retrieving(spec, lists.policy), shape)
            of_lists = (*args, lists.index, lists.least, choice.key(), whole.key())
            self._replace(site, torch.ops.torchaccel.attend_listed.default, of_lists)
        elif (least := self._choosing(site, plan, layouts[0], spec, shape)) is not None:
            assert plan.selection is not None
            whole, choice = choice, self.chooser.plan(replace(spec, mass=True), shape)
            # The newest of the listed tokens is the step's own.
            to_choose = (*args, plan.selection.listed - 1, least, choice.key(), whole.key())
            (index,) = self._replace(site, torch.ops.torchaccel.attend_choosing.default, to_choose, INDEX)
            self.retrieval.made[site.index] = Lists(index, plan.selection, least, pruned=False)
        elif mass:
            with_sides = (*args, None, None, choice.key())
            (received,) = self._replace(site, torch.ops.torchaccel.attend_with.default, with_sides, MASS)
            binding = replace(binding, mass_output=self.signature.extra_output(received))
        else:
            rotary = self._attend(site, args, choice)
        evicts = policy is not None and not policy.grows
        if policy is not None and policy.token_ids and ids is not None:
            binding = replace(binding, ids_output=self.signature.extra_output(ids))
        self.signature.appends.append(replace(binding, evicts=evicts, group=spec.group))
        self._note(site, choice, shape, _describe(layouts[0]), plan)
        self.sites[-1].rotary = rotary

    def _choosing(
        self, site: AttentionSite, plan: SitePlan, layout: Layout, spec: AttentionSpec, shape: AttentionShape
    ) -> int | None:
        """Stored tokens up to which a step's attention chooses nothing for other sites; None where it never does."""
        policy = plan.selection
        if not isinstance(policy, MostAttended) or plan.leader is not None or _hint(_fake(site.q).shape[2]) != 1:
            return None
        verdict = self.gate.lists(site, policy, spec, shape.batch, shape.sites)
        reason = unsupported(replace(spec, mass=True), self.context.device.type)
        if layout.pruned:
            self.declines.append(Decline(site.name, Reason.MOVED_TOKENS))
        elif reason is not None:
            self.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))
        elif verdict is not None and verdict.switch_tokens is None:
            self.declines.append(Decline(site.name, Reason.SLOWER, verdict.text))
        else:
            return self.gate.least(site, policy, spec, shape.batch, shape.sites)
        return None

    def _attend(self, site: AttentionSite, args: tuple[Any, ...], plan: Plan) -> bool:
        """Attention without side results; returns whether its kernels do the rotary embedding, too."""
        found = self._rotary(site, plan)
        if found is None:
            self._replace(site, torch.ops.torchaccel.attend.default, (*args, plan.key()))
            return False
        # Rotating is the same little work for every candidate: what was chosen without holds with it.
        rotated = Plan(replace(plan.spec, rotary=found.style, rotary_dim=found.dim), plan.picks)
        tables = found.cos, found.sin
        args = (found.q, found.k_new, *args[2:], *tables, rotated.key())
        self._replace(site, torch.ops.torchaccel.attend_rotary.default, args)
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

    def _attend_shared(
        self,
        site: AttentionSite,
        plan: SitePlan,
        spec: AttentionSpec,
        buffers: list[Node],
        layouts: tuple[Layout, Layout],
    ) -> None:
        """Attention of rows whose caches share prefixes: these are read once for all of their rows."""
        keys, values = site.key_cache.past, site.value_cache.past
        assert keys is not None and values is not None
        names = prefix_names(layouts[0])
        prefixes: list[Node] = []
        for name in names:
            prefixes += [self.signature.buffer(keys, layouts[0], name), self.signature.buffer(values, layouts[1], name)]
        lens = self.signature.placeholder(f"{keys.name}_lens", torch.zeros(1 + len(names), 3, dtype=torch.int64))
        own, shared = shared_prefix.specs(spec)
        # Which of the tokens are whose is data: for the choice, they are thought to be in the prefix.
        shape = self._shape(site, _size(_fake(keys).shape[2]))
        entries = [_size(getattr(_fake(keys), name).shape[0]) for name in names]
        rows = [shape.batch // count for count in entries]
        of_prefix = replace(shape, batch=entries[0], queries=shape.queries * rows[0])
        choice, of_own = self.chooser.plan(shared, of_prefix), self.chooser.plan(own, shape)
        args = (site.q, site.key_cache.new, site.value_cache.new, *buffers, lens, site.mask, prefixes)
        self._replace(site, torch.ops.torchaccel.attend_shared.default, (*args, of_own.key(), choice.key()))
        layout = f"{_describe(layouts[0])}, shared prefix of {' and of '.join(str(count) for count in rows)} rows"
        self._note(site, choice, of_prefix, layout, plan)

    def _attend_ragged(
        self, site: AttentionSite, plan: SitePlan, spec: AttentionSpec, buffers: list[Any], layout: Layout
    ) -> None:
        """Attention over a cache whose heads keep different numbers of tokens; buffers: keys, values, positions."""
        past = site.key_cache.past
        assert past is not None and layout.eviction is not None
        windows = layout.eviction.windows
        if windows is not None and spec.window is not None:
            self.declines.append(Decline(site.name, Reason.RAGGED_WINDOW))
        spec, bound = ragged_spec(spec, windows), None
        if windows is not None:
            with self.graph.inserting_before(site.node):
                bound = marks_of(windows, self.graph, self.context.device)
        k_pool, v_pool, positions = buffers
        table, tails = (self.signature.buffer(past, layout, name) for name in ("pages", "tails"))
        lens = self.signature.placeholder(f"{past.name}_lens", torch.zeros(4, dtype=torch.int64))
        shape = self._shape(site, _size(_fake(past).shape[2]))
        choice = self.chooser.plan(spec, shape)
        new = site.key_cache.new, site.value_cache.new
        args = (site.q, *new, k_pool, v_pool, lens, site.mask, positions, table, tails, bound, choice.key())
        self._replace(site, torch.ops.torchaccel.attend_ragged.default, args)
        self._note(site, choice, shape, _describe(layout), plan)

    def _replace(
        self, site: AttentionSite, target: Callable[..., Any], args: tuple[Any, ...], *sides: int
    ) -> list[Node]:
        """Put an operator in the place of a site; ``sides``: which results to return of one that has several."""
        with self.graph.inserting_before(site.node):
            node = self.graph.call_function(target, args)
            received = [self.graph.call_function(operator.getitem, (node, side)) for side in sides]
            if sides:
                node = self.graph.call_function(operator.getitem, (node, 0))
        node.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(node)
        self.graph.erase_node(site.node)
        return received

    def _shape(self, site: AttentionSite, tokens: int) -> AttentionShape:
        batch, _, queries, _ = (_size(size) for size in _fake(site.q).shape)
        # A turn may be longer than what is stored before it; it sees itself.
        tokens = max(tokens, queries)
        return AttentionShape(batch, site.kv_heads, queries, tokens, sites=len(self.context.anatomy.attentions))

    def _note(self, site: AttentionSite, choice: Plan, shape: AttentionShape, layout: str, plan: SitePlan) -> None:
        name = choice.pick(shape.tokens).implementation
        switches = tuple((limit, candidate.key()) for limit, candidate in choice.picks)
        predicted = self.chooser.predicted_ms(choice, shape)
        self.sites.append(LoweredSite(site.name, name, layout, plan.window, plan.sinks, switches, predicted))
        reason = unsupported(choice.spec, self.context.device.type)
        if reason is not None:
            self.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))


def _unshared(spec: AttentionSpec, window: int | None, layouts: tuple[Layout, Layout]) -> str | None:
    """Why the prefixes that a layer's rows share have to be copied; None when there are none, or when they need not."""
    if not any(layout.prefixes for layout in layouts):
        return None
    if layouts[0].prefixes != layouts[1].prefixes:
        return "keys and values share different prefixes"
    if window is not None:
        return f"the layer keeps a sliding window of {window} tokens"
    return shared_prefix.unsupported(spec)


def _latent(keys: Layout, values: Layout) -> bool:
    """Whether keys or values are stored as latents."""
    return keys.factors is not None or values.factors is not None


def _remembering(plan: SitePlan) -> Selection | None:
    """The policy of which the site's keys carry the state."""
    return plan.selection if isinstance(plan.selection, Selection) and plan.leader is None else None


def _wants_ids(plan: SitePlan) -> bool:
    return any(policy is not None and policy.token_ids for policy in (plan.eviction, _remembering(plan)))


def _describe(layout: Layout) -> str:
    if layout.mixing is not None:
        return f"{layout.format.kind}, then {' or '.join(keys.kind for keys, _ in layout.mixing.formats)}"
    kept = f" {type(layout.eviction).__name__}" if layout.eviction else " pruned" if layout.pruned else ""
    return layout.format.kind + kept + (f" {type(layout.selection).__name__}" if layout.selection else "")


def _fake(node: Node) -> Any:
    return node.meta["example_value"]


def _size(size: Any) -> int:
    """A size as a number; of a symbolic one, what it was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _hint(size: Any) -> Any:
    return size if isinstance(size, int) else None
