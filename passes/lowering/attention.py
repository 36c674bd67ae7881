"""Lowers canonical attention to kernels and turns cache tensors into physical buffers of the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torchaccel.kernels import ops
from torchaccel.kernels.candidates import unsupported
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat, dtype_name

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.bindings import AppendBinding, Bindings, StoreBinding, TokenCount
from torchaccel.runtime.kv import LogicalKV, compress
from torchaccel.runtime.storage import Layout

from ..base import Decline, Reason, RewriteContext, SitePlan
from ..dead_code import remove_dead_code
from .choice import Chooser
from .rotary import Rotary, find_rotary, pays


@dataclass
class LoweredSite:
    """What became of one attention site: the kernel that runs it and the layouts of its cache.

    switches: the candidates by the number of stored tokens up to which each runs, the last one without a limit.
    predicted_ms: of one call, with as many tokens stored as when the graph was compiled.
    rotary: whether the kernel does the rotary embedding of the queries and the new keys, too.
    """

    site: str
    kernel: str
    layout: str
    window: int | None = None
    sinks: int = 0
    switches: tuple[tuple[int | None, str], ...] = ()
    predicted_ms: float | None = None
    rotary: bool = False


@dataclass
class Lowered:
    """The rewritten graph's signature, the example inputs of its new placeholders, and a line per site."""

    bindings: Bindings
    inputs: list[Any]
    sites: list[LoweredSite] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)


class AttentionLowering:
    """Lowers every site of one graph; a site that cannot be lowered stays canonical and exact."""

    def __init__(
        self,
        context: RewriteContext,
        example_inputs: list[Any],
        chooser: Chooser | None = None,
        *,
        rotary: bool = False,
    ):
        """chooser: which candidates the kernels are; by default every kernel's seed. rotary: embed in them, too."""
        self.rotary = rotary
        self.context = context
        self.chooser = chooser or Chooser(context.device)
        self.graph: Graph = context.graph
        self.examples = example_inputs
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.output = next(n for n in self.graph.nodes if n.op == "output")
        self.results: list[Any] = list(self.output.args[0])
        self.removed: set[int] = set()
        self.extra: list[Node] = []
        self.appends: list[AppendBinding] = []
        self.stores: list[StoreBinding] = []
        self.inputs: list[Any] = []
        self.sites: list[LoweredSite] = []
        self.declines: list[Decline] = []
        self.last_placeholder = self.placeholders[-1]

    def run(self) -> Lowered:
        """Rewrite the graph in place and return its new signature."""
        ops.library()
        phase = self.context.anatomy.phase
        for site in self.context.anatomy.attentions:
            plan = self.context.plan(site)
            kind = site.key_cache.kind
            problem = self._problem(site)
            if kind in ("cross", "unknown"):
                continue
            if problem is not None:
                self.declines.append(problem)
            elif kind == "none":
                self._lower_prompt(site, plan)
            elif kind == "static":
                self._lower_static(site, plan)
            elif site.key_cache.past is None:
                self._lower_prefill(site, plan)
            elif phase in ("decode", "extend"):
                self._lower_append(site, plan)
        return self._finish()

    def _problem(self, site: AttentionSite) -> Decline | None:
        if site.dtype not in DTYPES.values():
            return Decline(site.name, Reason.UNSUPPORTED_DTYPE, str(site.dtype))
        if _fake(site.k).shape[3] != _fake(site.v).shape[3] or _fake(site.q).shape[3] != site.head_dim:
            return Decline(site.name, Reason.UNEQUAL_HEAD_DIMS)
        for cache in (site.key_cache, site.value_cache):
            if cache.past is None or cache.kind == "static":
                continue
            readers = set(cache.full.users) - {site.node, self.output, cache.stored}
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
        kind: Any = "empty" if plan.dropped else plan.format
        dtype, dim = dtype_name(site.dtype), site.head_dim
        positions = plan.keep is not None and not plan.dropped
        return (
            Layout(KVFormat(kind, dtype, dim, "channel" if kind == "int8" else "token"), positions),
            Layout(KVFormat(kind, dtype, dim, "token", packing="token"), positions),
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

    def _lower_prompt(self, site: AttentionSite, plan: SitePlan) -> None:
        """Attention of a prompt over itself: the generated kernel where it wins, stock sdpa elsewhere."""
        device = self.context.device.type
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        spec = self._spec(site, plan, "prefill", dense, dense)
        # Dense prompts from 128 tokens on: ours is 1.7-5.7x stock sdpa on the CPU; on a GPU stock flash kernels win.
        if plan.window is None and (device != "cpu" or unsupported(spec, device) is not None):
            self.sites.append(LoweredSite(site.name, "stock sdpa", "none"))
            return
        shape = self._shape(site, _size(_fake(site.k).shape[2]))
        choice = self.chooser.plan(spec, shape)
        args = (site.q, site.k, site.v, site.mask, choice.key())
        self._replace(site, torch.ops.torchaccel.attend_prompt.default, args)
        self._note(site, choice, shape, "none", plan)

    def _lower_prefill(self, site: AttentionSite, plan: SitePlan) -> None:
        self._lower_prompt(site, plan)
        stored = site.key_cache.stored, site.value_cache.stored
        if stored[0] is None or stored[1] is None:
            return
        tokens = positions_output = None
        key_layout, value_layout = self._layouts(site, plan)
        if plan.keep is not None:
            tokens = self._token_count()
            positions_output = self._extra_output(plan.keep)
            if tokens is None:
                self.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
                return
        elif plan.dropped:
            tokens = self._token_count()
        self.stores.append(
            StoreBinding(
                self.results.index(stored[0]),
                self.results.index(stored[1]),
                key_layout,
                value_layout,
                positions_output,
                tokens,
            )
        )
        self.sites[-1].layout = _describe(key_layout)

    def _lower_append(self, site: AttentionSite, plan: SitePlan) -> None:
        keys, values = site.key_cache, site.value_cache
        assert keys.past is not None and values.past is not None
        tokens = self._token_count()
        stored = keys.stored, values.stored
        if tokens is None or stored[0] is None or stored[1] is None:
            self.declines.append(Decline(site.name, Reason.UNKNOWN_LENGTH))
            return
        arguments = self.placeholders.index(keys.past), self.placeholders.index(values.past)
        outputs = self.results.index(stored[0]), self.results.index(stored[1])
        given = [self.examples[i] for i in arguments]
        layouts = self._layouts(site, plan)
        if all(isinstance(t, LogicalKV) for t in given):
            layouts = given[0].kv_layout, given[1].kv_layout
        skipped = plan.dropped or layouts[0].format.kind == "empty"
        self.appends.append(
            AppendBinding(
                *arguments, *outputs, *layouts, tokens, keys.window, layouts[0].positions and not skipped, skipped
            )
        )
        self.removed.update(outputs)
        if skipped:
            self.sites.append(LoweredSite(site.name, "skipped", "empty"))
            return
        spec = self._spec(site, plan, "decode", layouts[0].format, layouts[1].format)
        spec = replace(spec, positions=layouts[0].positions)
        buffers = [self._buffer(past, layout) for past, layout in zip((keys.past, values.past), layouts, strict=True)]
        positions = self._placeholder(f"{keys.past.name}_positions") if spec.positions else None
        if positions is not None:
            self.inputs.append(self._inner(keys.past, layouts[0], "positions"))
        lens = self._placeholder(f"{keys.past.name}_lens")
        self.inputs.append(torch.zeros(3, dtype=torch.int64))
        shape = self._shape(site, _size(_fake(keys.past).shape[2]))
        choice = self.chooser.plan(spec, shape)
        rotary = self._rotary(site, choice)
        target: Any = torch.ops.torchaccel.attend.default
        q, k_new, key = site.q, keys.new, choice.key()
        tables: tuple[Node, ...] = ()
        if rotary is not None:
            target = torch.ops.torchaccel.attend_rotary.default
            q, k_new, tables = rotary.q, rotary.k_new, (rotary.cos, rotary.sin)
            # Rotating is the same little work for every candidate: what was chosen without holds with it.
            key = Plan(replace(spec, rotary=rotary.style, rotary_dim=rotary.dim), choice.picks).key()
        args = (q, k_new, values.new, *buffers, lens, site.mask, positions, *tables, key)
        self._replace(site, target, args)
        self._note(site, choice, shape, _describe(layouts[0]), plan)
        self.sites[-1].rotary = rotary is not None

    def _rotary(self, site: AttentionSite, choice: Plan) -> Rotary | None:
        """The rotary embedding that the kernels of a plan are to do; None where it stays outside."""
        found = find_rotary(site) if self.rotary else None
        if found is None or not pays(found, self.context.device):
            return None
        # Stock operators rotate in a dozen launches, Inductor in one loop.
        generated = all(candidate.implementation in ("cpp", "triton") for _, candidate in choice.picks)
        return found if generated and self.context.fuel.take() else None

    def _buffer(self, past: Node, layout: Layout) -> Node:
        node = self._placeholder(f"{past.name}_buffer")
        self.inputs.append(self._inner(past, layout, "buf"))
        return node

    def _inner(self, past: Node, layout: Layout, name: str) -> Any:
        fake = past.meta["example_value"]
        if isinstance(fake, LogicalKV):
            return getattr(fake, name)
        return getattr(compress(layout, self.examples[self.placeholders.index(past)]), name)

    def _placeholder(self, name: str) -> Node:
        with self.graph.inserting_after(self.last_placeholder):
            self.last_placeholder = self.graph.placeholder(name)
        return self.last_placeholder

    def _replace(self, site: AttentionSite, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with self.graph.inserting_before(site.node):
            node = self.graph.call_function(target, args)
        node.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(node)
        self.graph.erase_node(site.node)

    def _shape(self, site: AttentionSite, tokens: int) -> AttentionShape:
        batch, _, queries, _ = (_size(size) for size in _fake(site.q).shape)
        return AttentionShape(batch, site.kv_heads, queries, tokens, sites=len(self.context.anatomy.attentions))

    def _note(self, site: AttentionSite, choice: Plan, shape: AttentionShape, layout: str, plan: SitePlan) -> None:
        name = choice.pick(shape.tokens).implementation
        switches = tuple((limit, candidate.key()) for limit, candidate in choice.picks)
        predicted = self.chooser.predicted_ms(choice, shape)
        self.sites.append(LoweredSite(site.name, name, layout, plan.window, plan.sinks, switches, predicted))
        reason = unsupported(choice.spec, self.context.device.type)
        if reason is not None:
            self.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))

    def _extra_output(self, node: Node) -> int:
        if node not in self.extra:
            self.extra.append(node)
        return len(self.results) + self.extra.index(node)

    def _token_count(self) -> TokenCount | None:
        length = self.context.anatomy.query_length
        if isinstance(length, int):
            return TokenCount(length)
        for index, node in enumerate(self.placeholders):
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and value.node.expr == length.node.expr:
                return TokenCount(None, index)
            if isinstance(value, Tensor) and not isinstance(value, LogicalKV):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == length.node.expr:
                        return TokenCount(None, index, dim)
        return None

    def _finish(self) -> Lowered:
        kept = [i for i in range(len(self.results)) if i not in self.removed]
        self.output.args = (tuple([self.results[i] for i in kept] + self.extra),)
        remove_dead_code(self.graph)
        alive = []
        for index, node in enumerate(self.placeholders):
            # Lengths are data now: without readers they would only add guards and arguments.
            if node.users or not _cache_or_length(node):
                alive.append(index)
            else:
                self.graph.erase_node(node)
        bindings = Bindings(
            tuple(alive),
            tuple(self.appends),
            tuple(self.stores),
            tuple(kept + [len(self.results) + i for i in range(len(self.extra))]),
            len(self.results),
        )
        return Lowered(bindings, self.inputs, self.sites, self.declines)


def _cache_or_length(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, (LogicalKV, torch.SymInt, int)) or "past_key_values" in node.name


def _describe(layout: Layout) -> str:
    return layout.format.kind + (" pruned" if layout.positions else "")


def _fake(node: Node) -> Any:
    return node.meta["example_value"]


def _size(size: Any) -> int:
    """A size as a number; of a symbolic one, what it was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _hint(size: Any) -> Any:
    return size if isinstance(size, int) else None
