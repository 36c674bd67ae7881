"""The pass that takes the kept tokens of several tensors in one kernel; exact."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torchaccel.kernels import ops, registry

from torchaccel.graph.nodes import dtype, hint, op_name, sizes

from ..base import Fidelity, Pass, PassResult, RewriteContext
from ..dead_code import remove_dead_code
from .aliases import source
from .fuse_rows import FusedGroup, microseconds
from .gathers import GatherGroup, TokenGather, count, find_gathers, problem, runs
from .legality import Legality
from .plan import Candidate, Chosen, Rates, best_runs

# What Inductor computes where it is read, if nobody else reads it.
_POINTWISE = frozenset({"add", "sub", "mul", "div", "neg", "to", "float", "type_as", "cos", "sin", "silu", "gelu"})


class FuseGathers(Pass):
    """Groups gathers by one index, such as those of hidden states, rotary tables and mask behind token pruning.

    What Inductor makes a part of a neighbouring loop (a residual that is only read through the gather, and the norm
    behind it) stays with it.
    """

    name = "fuse_gathers"
    fidelity = Fidelity.EXACT

    def __init__(self, rates: Rates | None):
        """rates: what the machine charges; they decide what is fused. None where nobody knows: nothing is."""
        self.rates = rates
        self.groups: list[FusedGroup] = []

    def apply(self, context: RewriteContext) -> PassResult:
        """Fuse every group that is predicted to save time, in place."""
        self.groups = []
        if self.rates is None:
            return self.result(
                [], [], f"nothing measured on {context.device.type} says that it beats Inductor's fusion"
            )
        found: list[FusedGroup] = []
        left = 0
        for gathers in find_gathers(context.graph):
            legality = Legality(context.graph, context.device.type)
            options = [score(group, self.rates) for group in runs(gathers) if problem(group, legality) is None]
            chosen = best_runs(len(gathers), [option for option in options if option.saved_seconds > 0])
            left += bool(options) and not chosen
            for one in chosen:
                if not context.fuel.take():
                    break
                _rewrite(context.graph, one.candidate.group, context.device.type)
                found.append(_described(one))
        remove_dead_code(context.graph)
        self.groups = found
        detail = f"{left} left to Inductor, which is predicted to do as well" if left else ""
        return self.result([group.site for group in found], [], detail)


def score(group: GatherGroup, rates: Rates) -> Candidate[GatherGroup]:
    """What a group saves against Inductor's loops: one for all results of a shape, and none where it is inlined."""
    apart = [gather.output for gather in group.gathers if not _inlined(gather)]
    loops = {(*map(hint, sizes(node)), dtype(node)) for node in apart}
    index_bytes = 8 * count(group.gathers[0].index)
    moved = (len(loops) - 1) * index_bytes
    before = len(loops) * rates.loop_seconds
    for gather in group.gathers:
        size = gather.elements * gather.item.width
        if _inlined(gather):
            # The whole tensor is written and what is kept of it read; the result is written and read once more.
            moved -= (count(gather.x) * gather.item.width) + 3 * size
        elif gather.item.square:
            before += gather.elements * rates.scattered_seconds
    after = rates.operator_seconds + rates.fork_seconds
    return Candidate(group, moved, len(loops) - 1, moved / rates.bytes_per_second + before - after)


def _inlined(gather: TokenGather) -> bool:
    made = source(gather.x)
    return op_name(made) in _POINTWISE and len(gather.x.users) == 1 and len(made.users) == 1


def _rewrite(graph: Graph, group: GatherGroup, device: str) -> None:
    """Replace a group by one call of ``torchaccel::gather_tokens``; dead nodes stay for the caller to remove."""
    ops.library()
    # A compiler that fails must do so here, where the graph can still be restored.
    registry.gather_tokens(group.spec, device)
    index, inputs = group.gathers[0].index, [gather.x for gather in group.gathers]
    order = {node: place for place, node in enumerate(graph.nodes)}
    target = torch.ops.torchaccel.gather_tokens.default
    with graph.inserting_after(max((index, *inputs), key=order.__getitem__)):
        call = place = graph.call_function(target, (inputs, index, group.spec.key()))
    for number, gather in enumerate(group.gathers):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (call, number))
        place.meta = dict(gather.output.meta)
        gather.output.replace_all_uses_with(place)


def _described(chosen: Chosen[GatherGroup]) -> FusedGroup:
    candidate = chosen.candidate
    return FusedGroup(
        kernel=_kernel(candidate.group),
        site=candidate.group.gathers[0].index.name,
        linears=0,
        saved_bytes=candidate.saved_bytes,
        saved_launches=candidate.saved_launches,
        saved_microseconds=microseconds(candidate),
        lost=tuple((_kernel(other.group), microseconds(other)) for other in chosen.lost),
    )


def _kernel(group: GatherGroup) -> str:
    """What a group gathers, such as "gather attention_mask, cos, sin"."""
    return f"gather {', '.join(_name(gather.x) for gather in group.gathers)}"


def _name(node: Node) -> str:
    return source(node).name
