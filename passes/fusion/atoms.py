"""A graph as steps of fused kernels: every linear layer, norm, activation or residual is one atom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torchaccel.kernels.fused_spec import Activation, Add, Concat, Linear, Multiply, Scale, Slice, Step
from torchaccel.kernels.spec import DTYPES

from torchaccel.graph.nodes import argument, arguments, dtype, is_number, op_name, shape

from ..lowering.linear import stored_weight
from .aliases import is_alias, source
from .patterns import match_gelu, match_norms, match_rope


@dataclass(frozen=True, eq=False)
class Atom:
    """One step of a fused kernel and the nodes it replaces.

    output: the node with its result. nodes: all it computes with, output included. kind, facts: the step's class and
    its constants. values: argument -> the node it reads, behind views and copies of it (a tuple for ``Concat``).
    """

    output: Node
    kind: type[Step]
    values: Mapping[str, Node | tuple[Node, ...] | None]
    nodes: frozenset[Node] = field(repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def reads(self) -> list[Node]:
        """What the atom reads, parameters included, each once."""
        found: dict[Node, None] = {}
        for value in self.values.values():
            found.update(dict.fromkeys(value if isinstance(value, tuple) else () if value is None else (value,)))
        return list(found)

    def rows(self) -> list[Node]:
        """What the atom reads, without parameters and tables."""
        tables = {self.values.get(name) for name in ("weight", "bias", "cos", "sin")}
        return [node for node in self.reads() if node not in tables]


def count(node: Node) -> int:
    """Number of elements of a tensor of static shape."""
    return math.prod(int(size) for size in shape(node) or ())


def find_atoms(graph: Graph) -> list[Atom]:
    """The atoms of a graph in its order; no node is in two of them, and nobody outside reads what is inside of one."""
    atoms: list[Atom] = []
    claimed: set[Node] = set()

    def claim(found: Atom) -> None:
        inside = found.nodes - {found.output}
        private = all(user in found.nodes for node in inside for user in node.users)
        if private and not claimed & found.nodes and _uniform(found):
            atoms.append(found)
            claimed.update(found.nodes)

    for matched in (*match_norms(graph), *match_rope(graph), *match_gelu(graph)):
        claim(Atom(*matched))
    for node in graph.nodes:
        if node not in claimed and (found := _single(node)) is not None:
            claim(found)
    order = {node: place for place, node in enumerate(graph.nodes)}
    return sorted(atoms, key=lambda atom: order[atom.output])


def _uniform(atom: Atom) -> bool:
    """Whether an atom reads and gives tensors of static shape and of one dtype that kernels know, on the CPU."""
    nodes = [atom.output, *atom.reads()]
    sizes = [size for node in nodes for size in shape(node) or (None,)]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or dtype(atom.output) not in DTYPES.values():
        return False
    return all(dtype(n) == dtype(atom.output) and n.meta["example_value"].device.type == "cpu" for n in nodes)


def _single(node: Node) -> Atom | None:
    """The atom of one operator."""
    name = op_name(node)
    if is_alias(node) or shape(node) is None or not all(isinstance(size, int) for size in shape(node) or ()):
        return None
    if name in ("linear", "addmm"):
        return _linear(node, str(name))
    if name in ("silu", "relu", "sigmoid", "tanh", "gelu"):
        return _activation(node, str(name))
    if name in ("add", "mul"):
        return _binary(node, str(name))
    if name == "getitem":
        return _slice(node)
    if name == "cat":
        return _concat(node)
    return None


def _linear(node: Node, name: str) -> Atom | None:
    if name == "linear":
        x, weight, bias = arguments(node)[0], arguments(node)[1], argument(node, 2, "bias")
    else:
        if len(arguments(node)) != 3 or node.kwargs:
            return None
        bias, x, weight = arguments(node)
    if not isinstance(x, Node) or not stored_weight(weight, 2) or not (bias is None or stored_weight(bias, 1)):
        return None
    values: dict[str, Any] = {"x": source(x), "weight": weight, "bias": bias}
    return Atom(node, Linear, values, frozenset({node}), {"by_columns": name == "addmm"})


def _activation(node: Node, name: str) -> Atom | None:
    x = argument(node, 0, "input")
    if node.kwargs.get("inplace") or (name in ("silu", "relu") and argument(node, 1, "inplace", False)):
        return None
    if name == "gelu" and argument(node, 1, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    return Atom(node, Activation, {"x": source(x)}, frozenset({node}), {"function": name})


def _binary(node: Node, name: str) -> Atom | None:
    if len(arguments(node)) != 2 or node.kwargs:
        return None
    x, y = arguments(node)
    if isinstance(x, Node) and isinstance(y, Node):
        if shape(x) != shape(node) or shape(y) != shape(node):
            return None
        kind = Add if name == "add" else Multiply
        return Atom(node, kind, {"x": source(x), "y": source(y)}, frozenset({node}))
    x, factor = (y, x) if is_number(x) else (x, y)
    if name != "mul" or not isinstance(x, Node) or not is_number(factor) or shape(x) != shape(node):
        return None
    return Atom(node, Scale, {"x": source(x)}, frozenset({node}), {"factor": float(factor)})


def _slice(node: Node) -> Atom | None:
    """Part of the last dimension: ``x[..., a:b]``, ``x.chunk(n, -1)[i]`` or ``x.split(n, -1)[i]``."""
    whole, index = arguments(node)
    if not isinstance(whole, Node):
        return None
    nodes = frozenset({node})
    if op_name(whole) in ("chunk", "split") and isinstance(index, int):
        x, start = arguments(whole)[0], _part_start(whole, index)
    else:
        x, start = whole, _cut_start(whole, index)
    if start is None or not isinstance(x, Node) or (shape(x) or ())[:-1] != (shape(node) or ())[:-1]:
        return None
    facts = {"group": (shape(x) or (0,))[-1], "start": start, "size": (shape(node) or (0,))[-1]}
    return Atom(node, Slice, {"x": source(x)}, nodes, facts)


def _part_start(parts: Node, index: int) -> int | None:
    """First column of part ``index`` of a chunk or split along the last dimension."""
    x, sizes, dim = arguments(parts)[0], argument(parts, 1, "chunks", argument(parts, 1, "split_size_or_sections")), 0
    dim = argument(parts, 2, "dim", 0)
    of = shape(x)
    if of is None or not isinstance(of[-1], int) or dim not in (-1, len(of) - 1) or index < 0:
        return None
    if isinstance(sizes, list | tuple):
        return sum(sizes[:index]) if all(isinstance(size, int) for size in sizes) else None
    if not isinstance(sizes, int):
        return None
    return index * (-(-of[-1] // sizes) if op_name(parts) == "chunk" else sizes)


def _cut_start(x: Node, index: Any) -> int | None:
    """First column of ``x[..., a:b]``."""
    parts = index if isinstance(index, tuple) else (index,)
    of = shape(x)
    if of is None or len(parts) < 2 or not isinstance(parts[-1], slice) or not isinstance(of[-1], int):
        return None
    if parts[0] is not Ellipsis and len(parts) != len(of):
        return None
    everything = all(part is Ellipsis or part == slice(None) for part in parts[:-1])
    start = parts[-1].start or 0
    if not everything or parts[-1].step not in (None, 1) or not isinstance(start, int):
        return None
    return start if start >= 0 else max(0, start + of[-1])


def _concat(node: Node) -> Atom | None:
    parts, dim = arguments(node)[0], argument(node, 1, "dim", 0)
    rank = len(shape(node) or ())
    if not isinstance(parts, list | tuple) or dim not in (-1, rank - 1) or rank < 2:
        return None
    empty = {part for part in parts if 0 in (shape(part) or ()) and len(part.users) == 1}
    kept = [part for part in parts if part not in empty]
    if any((shape(part) or ())[:-1] != (shape(node) or ())[:-1] for part in kept) or not kept:
        return None
    groups = count(node) // int((shape(node) or (1,))[-1])
    # Groups per row are known once the number of rows is: see ``rewrite``.
    return Atom(node, Concat, {"parts": tuple(source(p) for p in kept)}, frozenset({node, *empty}), {"groups": groups})


def static_rows(node: Node) -> int:
    """Rows of a linear layer's result ``[..., N]``."""
    return count(node) // int((shape(node) or (1,))[-1])


def element_bytes(node: Node) -> int:
    """Bytes of one element of a tensor node."""
    found = dtype(node)
    return torch.empty(0, dtype=found).element_size()
