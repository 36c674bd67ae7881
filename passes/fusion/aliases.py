"""Nodes that change how a tensor is seen but not its elements, nor their order in memory when it is contiguous."""

from __future__ import annotations

from torch.fx import Node

from torchaccel.graph.nodes import CASTS, argument, arguments, dtype, op_name, shape, sizes

_VIEWS = frozenset({"view", "reshape", "contiguous", "flatten", "unsqueeze", "squeeze", "clone", "alias"})
_MOVES = frozenset({"transpose", "permute"})


def is_alias(node: Node) -> bool:
    """Whether a node's elements, read in row-major order, are those of its first argument in row-major order.

    Views and copies are; a transposition is when it moves dimensions of size 1 only; so are casts to the same dtype,
    dropout outside of training, and slices that keep everything.
    """
    name = op_name(node)
    if name is None or not arguments(node) or not isinstance(arguments(node)[0], Node):
        return False
    x = arguments(node)[0]
    if shape(x) is None or shape(node) is None or dtype(x) != dtype(node):
        return False
    if not all(isinstance(size, int) for size in (*sizes(x), *sizes(node))):
        return False
    if name in _VIEWS:
        return argument(node, 1, "dtype") is None if name == "view" and "dtype" in node.kwargs else True
    if name in CASTS:
        return node.meta["example_value"].device == x.meta["example_value"].device
    if name == "dropout":
        return argument(node, 2, "training", True) is False
    if name == "getitem":
        parts = arguments(node)[1] if isinstance(arguments(node)[1], tuple) else (arguments(node)[1],)
        plain = all(part is None or part is Ellipsis or isinstance(part, slice) for part in parts)
        return plain and _count(x) == _count(node)
    return name in _MOVES and _keeps_order(node, x)


def is_parts(node: Node) -> bool:
    """Whether a node only names the parts of a tensor, which others then take: chunk and split."""
    return op_name(node) in ("chunk", "split")


def source(node: Node) -> Node:
    """The tensor behind views and copies."""
    while is_alias(node):
        found = arguments(node)[0]
        assert isinstance(found, Node)
        node = found
    return node


def _count(node: Node) -> int:
    total = 1
    for size in sizes(node):
        total *= int(size)
    return total


def _keeps_order(node: Node, x: Node) -> bool:
    """Whether the dimensions larger than 1 stand in the order they had."""
    rank = len(sizes(x))
    dims = list(range(rank))
    if op_name(node) == "transpose":
        a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        if not isinstance(a, int) or not isinstance(b, int):
            return False
        dims[a], dims[b] = dims[b], dims[a]
    else:
        order = argument(node, 1, "dims")
        order = list(order) if isinstance(order, list | tuple) else list(arguments(node)[1:])
        if not all(isinstance(dim, int) for dim in order) or len(order) != rank:
            return False
        dims = [dim % rank for dim in order]
    large = [dim for dim in dims if sizes(x)[dim] != 1]
    return large == sorted(large)
