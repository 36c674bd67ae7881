"""Follows the sequence dimension from one hidden state through everything computed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..errors import TorchaccelError
from .layout import Dim, Layout, dim, has_sequence, is_sequence
from .nodes import op_name, rank, same_size, sizes


class UntrackedSequenceError(TorchaccelError, RuntimeError):
    """The sequence dimension cannot be followed through a node.

    node: the node. Raised before anything is changed.
    """

    def __init__(self, node: Node, detail: str) -> None:
        super().__init__(
            f"cannot narrow the sequence of this graph: {node.name} ({op_name(node) or node.target}): {detail}; "
            "choose a boundary after it, or leave this graph whole"
        )
        self.node = node


@dataclass(frozen=True)
class Kept:
    """Stands in planned arguments for the size of a dimension once its sequence is narrowed."""

    dim: Dim


@dataclass(frozen=True)
class Gather:
    """What a consumer needs of a tensor from outside: only the kept positions of some dimensions.

    sequence: dimensions to gather, counted after ``lead`` dimensions of size one were put in front. batch: dimension
    that counts batch rows, None when the batch has one row.
    """

    source: Node
    sequence: tuple[int, ...]
    batch: int | None
    lead: int


@dataclass
class SequencePlan:
    """Everything narrowing will change, and nothing changed yet.

    region: nodes computed from the boundary, in graph order; ``inside`` is the same as a set. layouts: of every tensor
    in it (a list for nodes that return several). gathers: for each consumer, what to read instead of a tensor from
    outside. arguments: new positional arguments of nodes that name sizes, with ``Kept`` for a narrowed size. batch:
    number of rows.
    """

    region: list[Node]
    layouts: dict[Node, Any] = field(default_factory=dict)
    gathers: dict[Node, dict[Node, Gather]] = field(default_factory=dict)
    arguments: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    inside: set[Node] = field(default_factory=set)
    batch: Any = 1

    def layout(self, value: Any) -> Layout | None:
        """Layout of a tensor computed from the boundary, None for anything else."""
        found = self.layouts.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, tuple) else None

    def need(self, node: Node, value: Any) -> Layout:
        """Layout of an operand that must be computed from the boundary; raises UntrackedSequenceError."""
        found = self.layout(value)
        if found is None:
            raise UntrackedSequenceError(node, f"its operand {value} does not carry the sequence where it should")
        return found

    def align(self, node: Node, target: Layout, operand: Any) -> None:
        """Plans the gather of an outside operand that broadcasts, from the right, against ``target``."""
        if not isinstance(operand, Node) or operand in self.layouts or not rank(operand):
            return
        lead = len(target) - (rank(operand) or 0)
        if lead < 0:
            raise UntrackedSequenceError(node, f"{operand.name} has more dimensions than the result")
        wide = (1,) * lead + sizes(operand)
        along = [place for place, d in enumerate(target) if has_sequence(d) and not _is_one(wide[place])]
        if not along:
            return
        for place in along:
            if not is_sequence(target[place]) or not same_size(target[place][0].size, wide[place]):
                raise UntrackedSequenceError(
                    node, f"{operand.name} is aligned with a sequence merged with other things"
                )
        batch = next((i for i, d in enumerate(target) if len(d) == 1 and d[0].role == "batch"), None)
        if batch is None and self.batch != 1:
            raise UntrackedSequenceError(
                node, f"{operand.name} needs other rows for each batch row, which is merged here"
            )
        if batch is not None and batch > min(along):
            raise UntrackedSequenceError(node, f"{operand.name} has the batch after the sequence")
        added = (
            0 if batch is None else max(0, lead - batch)
        )  # each batch row keeps other positions: give it a dimension
        shift = lead - added
        gather = Gather(operand, tuple(p - shift for p in along), None if batch is None else batch - shift, added)
        if self.gathers.setdefault(node, {}).setdefault(operand, gather) != gather:
            raise UntrackedSequenceError(node, f"{operand.name} is aligned with the sequence in two ways")

    def broadcast(self, node: Node, operands: list[Any], ndim: int) -> Layout:
        """Layout of operands broadcast together; plans the gathers of those from outside."""
        tracked = [layout for layout in (self.layout(value) for value in operands) if layout is not None]
        result: list[Dim] = []
        for place in range(ndim):
            found: Dim = ()
            for layout in tracked:
                own = layout[place - ndim] if len(layout) >= ndim - place else ()
                if own and found and has_sequence(own) != has_sequence(found):
                    raise UntrackedSequenceError(node, f"a sequence meets something else in dimension {place}")
                found = found if found and has_sequence(found) else own or found
            result.append(found)
        for value in operands:
            self.align(node, tuple(result), value)
        outside = [value for value in operands if self.layout(value) is None and rank(value)]
        for place in range(ndim):
            wide = [sizes(value)[place - ndim] for value in outside if len(sizes(value)) >= ndim - place]
            if not result[place] and wide:
                result[place] = next((dim(size) for size in wide if not _is_one(size)), ())
        return tuple(result)


Rule = Callable[[SequencePlan, Node], Any]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def is_empty_tensor(value: Any) -> bool:
    """Whether an operand is a tensor of no elements, such as the cache before the first token."""
    return isinstance(value, Node) and any(isinstance(s, int) and s == 0 for s in sizes(value))


def example_sizes(node: Node) -> tuple[Any, ...]:
    """Sizes of a node's result; raises UntrackedSequenceError when it is not one tensor."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        raise UntrackedSequenceError(node, "its result is not a tensor")
    return tuple(value.shape)
