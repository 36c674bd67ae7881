"""Narrows the sequence of everything computed from one hidden state to a chosen set of tokens."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from .layout import Dim, Layout, dim
from .nodes import ancestors, descendants, expression, is_number, op_name, rank, sizes
from .propagate import annotate, infer
from .sequence import Gather, Kept, Rule, SequencePlan, UntrackedSequenceError
from .sequence_rules import rules

__all__ = ["UntrackedSequenceError", "narrow_sequence"]


def narrow_sequence(graph: Graph, boundary: Node, keep: Node) -> Node:
    """Makes everything computed from ``boundary`` work on the tokens ``keep`` alone; the graph stays valid.

    What is sequence-indexed and enters from outside (rotary tables, position embeddings, mask rows and columns) is
    gathered once and shared; sizes spelled out in views are replaced, told apart by tracking which dimension is the
    sequence and never by their value. Keys and values cached from then on have K rows. ``x[:, -1:]`` and ``x[:, 0]``
    become the last and first kept token. Example values are refreshed.

    graph: a prefill or encoder graph. boundary: hidden states ``[B, N, d]``, for instance a ``Layer.input``.
    keep: int64 ``[B, K]``, ascending token indices of each row; it must stand in the graph before the first node
    computed from ``boundary`` (nodes ``keep`` itself is computed from do not count, and stay whole).
    Returns the node of the kept hidden states ``[B, K, d]``.
    Raises UntrackedSequenceError, naming the node, when the sequence cannot be followed; the graph is then as before.
    """
    plan = _plan(graph, boundary, keep)
    edit = _Edit(graph, boundary, keep)
    try:
        return edit.apply(plan)
    except BaseException:
        edit.undo()
        raise


def _plan(graph: Graph, boundary: Node, keep: Node) -> SequencePlan:
    """Follows the sequence from the boundary to the graph's outputs, changing nothing."""
    for node, ndim in ((boundary, 3), (keep, 2)):
        if rank(node) != ndim:
            raise UntrackedSequenceError(node, f"expected a tensor of rank {ndim}, found rank {rank(node)}")
    after, before = descendants([boundary]) - {boundary}, ancestors([keep])
    region = [node for node in graph.nodes if node in after and node not in before and node.op != "output"]
    if region and region[0] < keep:
        raise UntrackedSequenceError(region[0], f"it is computed before the indices {keep.name} are known")
    batch, length, width = sizes(boundary)
    inside = set(region)
    plan = SequencePlan(region, inside=inside, batch=batch)
    plan.layouts[boundary] = (dim(batch, "batch"), dim(length, "sequence"), dim(width))
    table = rules()
    for node in region:
        found = _follow(plan, table, node)
        if found is not None:
            plan.layouts[node] = found
    del plan.layouts[boundary]
    return plan


def _follow(plan: SequencePlan, table: dict[Any, Rule], node: Node) -> Any:
    """Layout of one node's result, None when it is no tensor (a size)."""
    value = node.meta.get("example_value")
    several = isinstance(value, list | tuple) and not isinstance(value, torch.Size)
    if not isinstance(value, torch.Tensor) and not several:
        if isinstance(value, torch.Size | torch.SymInt) or is_number(value) or op_name(node) == "Size":
            return None
        raise UntrackedSequenceError(node, f"its result is a {type(value).__name__}")
    for source in node.all_input_nodes:
        layout = plan.layout(source)
        if layout is not None and any(factor.role == "tail" for d in layout for factor in d):
            raise UntrackedSequenceError(node, f"it works on a slice of the sequence ({source.name})")
    rule = table.get(node.target if node.op == "call_function" else None) or table.get(op_name(node))
    if rule is None:
        raise UntrackedSequenceError(node, "no rule says how this operator carries the sequence")
    return rule(plan, node)


class _Edit:
    """Applies a plan to a graph, and can take back what it did."""

    def __init__(self, graph: Graph, boundary: Node, keep: Node) -> None:
        self.graph = graph
        self.boundary = boundary
        self.keep = keep
        self.kept: Any = sizes(keep)[1]
        self.inserted: list[Node] = []
        self.before: list[tuple[Node, Any, Any]] = []
        self.gathered: dict[Gather, Node] = {}

    def apply(self, plan: SequencePlan) -> Node:
        """Inserts the gathers, rewrites sizes and inputs, then checks every shape on fake tensors."""
        whole = Gather(self.boundary, (1,), None if _is_one(plan.batch) else 0, 0)
        hidden = self._gather(whole)
        for node in plan.region:
            changes = {source: self._narrowed(gather) for source, gather in plan.gathers.get(node, {}).items()}
            if self.boundary in node.all_input_nodes:
                changes[self.boundary] = hidden
            planned = plan.arguments.get(node)
            if changes or planned:
                self.before.append((node, node.args, node.kwargs))
            if planned:
                node.args = map_aggregate(planned, partial(self._size, node))
            for source, replacement in changes.items():
                node.replace_input_with(source, replacement)
        self._check(plan)
        return hidden

    def undo(self) -> None:
        """Puts the graph back as it was."""
        for node, args, kwargs in reversed(self.before):
            node.args, node.kwargs = args, kwargs
        for node in reversed(self.inserted):
            self.graph.erase_node(node)

    def _insert(self, after: list[Node], make: Any) -> Node:
        """A new node right after the last of the given ones."""
        last = max(after)
        if last.op == "placeholder":
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = make()
        self.inserted.append(node)
        return annotate(node)

    def _narrowed(self, gather: Gather) -> Node:
        """The kept positions of an outside tensor; ``unsqueeze``, done in each layer, follows the shared gather."""
        if gather in self.gathered:
            return self.gathered[gather]
        source = gather.source
        place = source.args[1] if op_name(source) == "unsqueeze" and len(source.args) == 2 else None
        used = (*gather.sequence, *(() if gather.batch is None else (gather.batch,)))
        if not isinstance(place, int) or place < 0 or gather.lead or place in used:
            return self._gather(gather)
        inner = source.all_input_nodes[0]
        moved = Gather(inner, *_without(place, gather), 0)
        narrow = self._narrowed(moved)
        node = self._insert([source, narrow], lambda: self.graph.call_method("unsqueeze", (narrow, place)))
        self.gathered[gather] = node
        return node

    def _gather(self, gather: Gather) -> Node:
        """``take_along_dim`` of each sequence dimension."""
        if gather in self.gathered:
            return self.gathered[gather]
        node = gather.source
        if gather.lead:
            index = (None,) * gather.lead
            node = self._insert([node], lambda: self.graph.call_function(operator.getitem, (gather.source, index)))
        ndim = (rank(gather.source) or 0) + gather.lead
        for place in gather.sequence:
            chosen, index_node = node, self._index(ndim, place, gather.batch)
            node = self._insert(
                [chosen, index_node],
                lambda chosen=chosen, index_node=index_node, place=place: self.graph.call_function(
                    torch.take_along_dim, (chosen, index_node), {"dim": place}
                ),
            )
        self.gathered[gather] = node
        return node

    def _index(self, ndim: int, place: int, batch: int | None) -> Node:
        """``keep`` with size one in all dimensions but the batch (none for a single row) and ``place``."""
        entries: list[Any] = [None] * ndim
        entries[place] = slice(None)
        if batch is None:
            entries.insert(0, 0)
        else:
            entries[batch] = slice(None)
        found = next(
            (node for node in self.keep.users if node in self.inserted and node.args[1] == tuple(entries)), None
        )
        return found or self._insert(
            [self.keep], lambda: self.graph.call_function(operator.getitem, (self.keep, tuple(entries)))
        )

    def _size(self, node: Node, value: Any) -> Any:
        """A planned argument as it goes into the graph."""
        if not isinstance(value, Kept):
            return value
        fixed = 1
        for factor in value.dim:
            if factor.role != "sequence":
                if not isinstance(factor.size, int):
                    raise UntrackedSequenceError(
                        node, f"the sequence is merged with a size {factor.size} not known here"
                    )
                fixed *= factor.size
        if isinstance(self.kept, int):
            return fixed * self.kept
        count = next((n for n in self.keep.users if n in self.inserted and op_name(n) == "size"), None)
        if count is None:
            count = self._insert([self.keep], lambda: self.graph.call_method("size", (self.keep, 1)))
        if fixed == 1:
            return count
        return self._insert([count], lambda: self.graph.call_function(operator.mul, (count, fixed)))

    def _check(self, plan: SequencePlan) -> None:
        """Runs the narrowed region on fake tensors, compares its shapes with the plan, refreshes the example values."""
        values: dict[Node, Any] = {}
        for node in plan.region:
            try:
                values = infer([node], values)
            except UntrackedSequenceError:
                raise
            except Exception as error:
                raise UntrackedSequenceError(node, f"its narrowed inputs do not fit: {error}") from error
            layout = plan.layouts.get(node)
            if isinstance(layout, tuple):
                self._compare(node, layout, tuple(values[node].shape))
        for node, value in values.items():
            node.meta["example_value"] = value

    def _compare(self, node: Node, layout: Layout, found: tuple[Any, ...]) -> None:
        for place, (planned, size) in enumerate(zip(layout, found, strict=True)):
            if not any(factor.role == "tail" for factor in planned) and not self._fits(planned, size):
                raise UntrackedSequenceError(node, f"dimension {place} came out as {size}")

    def _fits(self, planned: Dim, size: Any) -> bool:
        """Whether a size is what the plan says."""
        wanted: Any = 1
        for factor in planned:
            wanted = wanted * (expression(self.kept) if factor.role == "sequence" else factor.size)
        return bool(wanted == expression(size)) or sympy.expand(wanted - expression(size)) == 0


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _without(place: int, gather: Gather) -> tuple[tuple[int, ...], int | None]:
    """Sequence and batch dimensions of a gather as they are without dimension ``place``."""
    batch = gather.batch
    return (
        tuple(d - (d > place) for d in gather.sequence),
        None if batch is None else batch - (batch > place),
    )
