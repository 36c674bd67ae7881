"""Feed-forward blocks of a graph: two projections with an activation between, gated or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from .nodes import CASTS, argument, arguments, op_name, rank, shape
from .streams import RESHAPES

_PROJECTIONS = frozenset({"linear", "addmm"})
_ACTIVATIONS = frozenset({"silu", "gelu", "relu", "relu6", "elu", "mish", "softplus", "hardswish", "sigmoid", "tanh"})
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "pow", "square", "exp", "erf", "neg", "clamp", "sqrt"})
_PARTS = frozenset({"getitem", "chunk", "split"})
_BETWEEN = _ACTIVATIONS | _ARITHMETIC | _PARTS | RESHAPES | CASTS | {"dropout", "dropout_", "relu_", "silu_"}


@dataclass(frozen=True)
class MlpSite:
    """One feed-forward block: ``down(act(gate(x)) * up(x))`` when gated, ``down(act(up(x)))`` when not.

    input: x, ``[.., d]``. up, gate: what is multiplied and what is activated, ``[.., d_ff]``: projections, or halves of
    one projection (then ``projections`` has one entry); gate is None when not gated. hidden: what enters ``down``.
    down: the last projection. activation: "silu", "gelu", "gelu_tanh", "relu", ..., or "unknown". projections: the
    linear (or addmm) nodes of gate and up.
    """

    input: Node
    gate: Node | None
    up: Node
    down: Node
    hidden: Node
    activation: str
    projections: tuple[Node, ...]


def find_mlps(nodes: Iterable[Node]) -> list[MlpSite]:
    """Every feed-forward block among some nodes, in graph order."""
    return [site for node in sorted(nodes) if (site := _mlp_at(node)) is not None]


def data_input(projection: Node) -> Node:
    """What a linear or addmm node projects."""
    place = 1 if op_name(projection) == "addmm" else 0
    return arguments(projection)[place]


def _mlp_at(down: Node) -> MlpSite | None:
    """The block that ends in a projection, or None when this is another projection."""
    if op_name(down) not in _PROJECTIONS:
        return None
    hidden = data_input(down)
    walked = _between(hidden)
    if walked is None:
        return None
    projections, inner = walked
    inputs = {_past_reshapes(data_input(node)) for node in projections}
    if not 1 <= len(projections) <= 2 or len(inputs) != 1 or not any(_is_active(node) for node in inner):
        return None
    halves = _factors(hidden)
    if halves is None:
        return MlpSite(inputs.pop(), None, projections[0], down, hidden, _name(inner), tuple(projections))
    gate, up, activation = halves
    return MlpSite(inputs.pop(), gate, up, down, hidden, activation, tuple(projections))


def _between(hidden: Node) -> tuple[list[Node], list[Node]] | None:
    """Projections above a node and the elementwise nodes in between; None when anything else is on the way."""
    pending, projections, inner = [hidden], [], []
    seen = {hidden}
    while pending:
        node = pending.pop()
        if op_name(node) in _PROJECTIONS:
            projections.append(node)
            continue
        if op_name(node) not in _BETWEEN or node.op == "placeholder":
            return None
        inner.append(node)
        for source in node.all_input_nodes:
            if source in seen or (source.op == "placeholder" and (rank(source) or 0) < 2) or shape(source) == ():
                continue
            seen.add(source)
            pending.append(source)
    return sorted(projections), sorted(inner)


def _past_reshapes(node: Node) -> Node:
    while op_name(node) in RESHAPES:
        node = arguments(node)[0]
    return node


def _is_active(node: Node) -> bool:
    return (op_name(node) or "").rstrip("_") in _ACTIVATIONS or op_name(node) in ("erf", "exp")


def _factors(hidden: Node) -> tuple[Node, Node, str] | None:
    """``(gate, up, activation)`` of ``act(gate) * up``, or None when this product is part of one activation."""
    while op_name(hidden) in RESHAPES | CASTS | {"dropout"}:
        hidden = arguments(hidden)[0]
    if op_name(hidden) != "mul":
        return None
    sides = [side for side in arguments(hidden)[:2] if isinstance(side, Node)]
    ends = [_ends(side) for side in sides]
    if len(sides) != 2 or any(end is None for end in ends):
        return None
    (left, left_inner), (right, right_inner) = ((end[0], end[1]) for end in ends if end is not None)
    if left is right:
        return None
    if any(_is_active(node) for node in left_inner):
        return left, right, _name(left_inner)
    return right, left, _name(right_inner)


def _ends(side: Node) -> tuple[Node, list[Node]] | None:
    """The one projection, or half of one, behind a factor, and the elementwise nodes in between."""
    pending, inner, found = [side], [], []
    while pending:
        node = pending.pop()
        is_half = op_name(node) == "getitem" and op_name(arguments(node)[0]) in ("chunk", "split")
        if op_name(node) in _PROJECTIONS or is_half:
            found.append(node)
        elif op_name(node) in _BETWEEN:
            inner.append(node)
            pending.extend(source for source in node.all_input_nodes if rank(source))
    return (found[0], inner) if len(set(found)) == 1 else None


def _name(inner: list[Node]) -> str:
    """The activation that some elementwise nodes compute."""
    active = [node for node in inner if _is_active(node)]
    names = {(op_name(node) or "").rstrip("_") for node in active}
    arithmetic = {op_name(node) for node in inner} & _ARITHMETIC
    if names == {"tanh"} and "pow" in arithmetic:
        return "gelu_tanh"
    if names == {"erf"}:
        return "gelu"
    if len(active) != 1:
        return "unknown"
    name = names.pop()
    if name == "gelu":
        return "gelu_tanh" if argument(active[0], 1, "approximate", "none") == "tanh" else "gelu"
    if name == "sigmoid" and "mul" in arithmetic:
        return "silu" if arithmetic == {"mul"} and not _scaled(active[0]) else "quick_gelu"
    return name


def _scaled(node: Node) -> bool:
    return op_name(arguments(node)[0]) == "mul"
