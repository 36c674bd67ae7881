"""Rotary position embeddings, however a model spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from .nodes import CASTS, argument, arguments, dtype, op_name, same_shape, shape


@dataclass(frozen=True)
class Rotation:
    """``output``: ``x`` with the first ``dim`` of its last dimension rotated, ``x * cos + rotate_half(x) * sin``.

    style: which channels are a pair, as in ``AttentionSpec.rotary``. cos, sin: the tables as they are multiplied, which
    broadcast to ``x[..., :dim]``. nodes: all that it is computed with, output included, x and the tables not.
    """

    output: Node
    x: Node
    cos: Node
    sin: Node
    style: Literal["half", "interleaved"]
    dim: int
    nodes: frozenset[Node]


def rotation_of(node: Node) -> Rotation | None:
    """The rotation whose result is a node: of all channels or the first ones, in float32 or in x's dtype, or None."""
    return rotation_at(node) or _partial(node) or _upcast(node)


def rotation_at(node: Node) -> Rotation | None:
    """The rotation of a whole tensor that ends in an addition, or None."""
    if op_name(node) != "add" or len(arguments(node)) != 2 or node.kwargs:
        return None
    products = [side for side in arguments(node) if op_name(side) == "mul" and len(arguments(side)) == 2]
    if len(products) != 2:
        return None
    for plain, crossed in (products, products[::-1]):
        for turned in arguments(crossed):
            found = _halves(turned) or _pairs(turned)
            if found is None:
                continue
            x, style, between = found
            cos, sin = _other(plain, x), _other(crossed, turned)
            size = (shape(x) or (0,))[-1]
            if cos is not None and sin is not None and same_shape(x, node) and isinstance(size, int):
                return Rotation(node, x, cos, sin, style, size, frozenset({node, plain, crossed, turned, *between}))
    return None


def _partial(node: Node) -> Rotation | None:
    """``cat((rotated(x[..., :dim]), x[..., dim:]), -1)``."""
    parts = _side_by_side(node, "cat")
    found = rotation_at(parts[0]) if parts else None
    cut, rest = (_part(found.x), _part(parts[1])) if parts and found else (None, None)
    if found is None or cut is None or rest is None or cut[0] is not rest[0]:
        return None
    whole = range((shape(node) or (0,))[-1])
    if cut[1] != whole[: found.dim] or rest[1] != whole[found.dim :] or not same_shape(cut[0], node):
        return None
    nodes = found.nodes | {node, *cut[2], *rest[2]}
    return Rotation(node, cut[0], found.cos, found.sin, found.style, found.dim, frozenset(nodes))


def _upcast(node: Node) -> Rotation | None:
    """``rotated(x.float()).to(x.dtype)``."""
    inner = arguments(node)[0] if op_name(node) in CASTS else None
    found = rotation_at(inner) or _partial(inner) if isinstance(inner, Node) else None
    if found is None or op_name(found.x) not in CASTS:
        return None
    x = arguments(found.x)[0]
    if dtype(x) != dtype(node):
        return None
    return Rotation(node, x, found.cos, found.sin, found.style, found.dim, found.nodes | {node, found.x})


def _halves(turned: Any) -> tuple[Node, Literal["half"], set[Node]] | None:
    """x of ``cat((-x[..., D / 2:], x[..., :D / 2]), -1)`` and the nodes between."""
    parts = _side_by_side(turned, "cat")
    half = (shape(turned) or (0,))[-1] // 2 if parts else 0
    found = _swapped(parts, range(half), range(half, 2 * half))
    return None if found is None else (found[0], "half", found[1])


def _pairs(turned: Any) -> tuple[Node, Literal["interleaved"], set[Node]] | None:
    """x of ``stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)`` and the nodes between."""
    if op_name(turned) != "flatten" or argument(turned, 1, "start_dim", 0) not in (-2, len(shape(turned) or ()) - 1):
        return None
    stacked = arguments(turned)[0]
    parts, size = _side_by_side(stacked, "stack"), (shape(turned) or (0,))[-1]
    found = _swapped(parts, range(0, size, 2), range(1, size, 2))
    return None if found is None else (found[0], "interleaved", {stacked, *found[1]})


def _swapped(parts: list[Node] | None, first: range, second: range) -> tuple[Node, set[Node]] | None:
    """x of the two parts ``-x[..., second], x[..., first]`` and the nodes between."""
    if parts is None or op_name(parts[0]) != "neg":
        return None
    negated, plain = _part(arguments(parts[0])[0]), _part(parts[1])
    if negated is None or plain is None or negated[0] is not plain[0] or (plain[1], negated[1]) != (first, second):
        return None
    return plain[0], {*parts, *negated[2], *plain[2]}


def _side_by_side(node: Any, name: str) -> list[Node] | None:
    """The two parts that a ``cat`` or a ``stack`` puts side by side in the last dimension."""
    if op_name(node) != name:
        return None
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-1, len(shape(node) or ()) - 1):
        return None
    return list(parts)


def _part(node: Any) -> tuple[Node, range, set[Node]] | None:
    """x, the channels and the nodes of ``x[..., a:b:c]``, ``x.chunk(2, -1)[i]`` or ``x.split(n, -1)[i]``."""
    if op_name(node) != "getitem":
        return None
    whole, index = arguments(node)
    if op_name(whole) in ("chunk", "split"):
        x, size = arguments(whole)[0], (shape(node) or (0,))[-1]
        last = (shape(x) or (0,))[-1]
        each = argument(whole, 1, "chunks", argument(whole, 1, "split_size_or_sections"))
        if op_name(whole) == "chunk":
            each = -(-last // each) if isinstance(last, int) else None
        if argument(whole, 2, "dim", 0) not in (-1, len(shape(x) or ()) - 1) or not isinstance(each, int):
            return None
        return x, range(index * each, index * each + size), {whole, node}
    width = (shape(whole) or (None,))[-1]
    if not isinstance(width, int) or not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return None
    if any(part is not Ellipsis and part != slice(None) for part in index[:-1]):
        return None
    if index[0] is not Ellipsis and len(index) != len(shape(whole) or ()):
        return None
    return whole, range(width)[index[-1]], {node}


def _other(product: Node, one: Any) -> Node | None:
    """The other factor of a product, when it is a node."""
    sides = [side for side in arguments(product) if side is not one]
    return sides[0] if len(sides) == 1 and isinstance(sides[0], Node) else None
