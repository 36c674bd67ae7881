"""The spec of a group: its atoms as steps of a fused kernel."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torchaccel.kernels.fused_spec import FusedSpec, Input, Linear, Norm, Output, Rope
from torchaccel.kernels.spec import dtype_name

from torchaccel.graph.nodes import shape

from .atoms import count, static_rows
from .groups import Group


def group_rows(group: Group) -> int:
    """Rows of the group's values: those of its linear layers."""
    return static_rows(next(atom.output for atom in group.atoms if atom.kind is Linear))


def spec_of(group: Group) -> FusedSpec:
    """The spec whose inputs are ``group.inputs`` and whose outputs are ``group.results``, in their order."""
    rows = group_rows(group)
    numbers = {node: place for place, node in enumerate(group.inputs)}
    kinds = _kinds(group)
    inputs = tuple(_input(node, kinds.get(node, "rows"), rows) for node in group.inputs)
    steps = []
    for atom in group.atoms:
        values: dict[str, Any] = {}
        for name, value in atom.values.items():
            values[name] = (
                tuple(numbers[node] for node in value)
                if isinstance(value, tuple)
                else None
                if value is None
                else numbers[value]
            )
        facts = dict(atom.facts)
        if "groups" in facts:  # of the whole tensor, in which every row has the same number of them
            facts["groups"] //= rows
        steps.append(atom.kind(**values, **facts))
        numbers[atom.output] = len(numbers)
    outputs = tuple(Output(numbers[node], _sizes(seen[0])) for node, seen in group.results.items())
    dtype = dtype_name(group.atoms[0].output.meta["example_value"].dtype)
    return FusedSpec(dtype, rows, inputs, tuple(steps), outputs)


def _kinds(group: Group) -> dict[Node, Any]:
    """What kind of input every parameter and table is."""
    found: dict[Node, Any] = {}
    for atom in group.atoms:
        for name, value in atom.values.items():
            if isinstance(value, Node) and atom.kind in (Linear, Norm) and name in ("weight", "bias"):
                found[value] = "weight" if atom.kind is Linear and name == "weight" else "vector"
            elif isinstance(value, Node) and atom.kind is Rope and name in ("cos", "sin"):
                found[value] = "table"
    return found


def _input(node: Node, kind: Any, rows: int) -> Input:
    if kind in ("weight", "vector"):
        return Input(kind, _sizes(node))
    if kind == "table":
        width = _sizes(node)[-1]
        return Input(kind, (count(node) // width, width))
    return Input(kind, (rows, count(node) // rows))


def _sizes(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in shape(node) or ())
