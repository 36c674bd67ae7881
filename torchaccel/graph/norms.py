"""RMS and layer norms of a graph, as single operators or written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch.fx import Graph, Node

from .nodes import CASTS, argument, arguments, is_number, op_name, rank


@dataclass(frozen=True)
class NormSite:
    """One normalisation over the last dimension.

    input: before any cast. output: after weight and cast back, same shape. kind: "rms" ``x / sqrt(mean(x^2) + eps)`` or
    "layer" (mean subtracted, bias possible). weight: ``[d]`` or None; the factor is ``weight + weight_offset`` (Gemma's
    offset is 1). bias: ``[d]`` or None.
    """

    kind: Literal["rms", "layer"]
    input: Node
    output: Node
    weight: Node | None
    bias: Node | None
    eps: float
    weight_offset: float = 0.0


def find_norms(graph: Graph) -> list[NormSite]:
    """Every norm of a graph, in graph order."""
    return [site for node in graph.nodes for site in _norm_at(node)]


def _norm_at(node: Node) -> Iterator[NormSite]:
    name = op_name(node)
    if name == "layer_norm" and len(argument(node, 1, "normalized_shape")) == 1:
        weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
        yield NormSite("layer", arguments(node)[0], node, weight, bias, argument(node, 4, "eps", 1e-5))
    elif name == "rms_norm" and is_number(argument(node, 3, "eps")):
        yield NormSite("rms", arguments(node)[0], node, argument(node, 2, "weight"), None, argument(node, 3, "eps"))
    elif name == "rsqrt":
        site = _written_out(node)
        if site is not None:
            yield site


def _written_out(inverse: Node) -> NormSite | None:
    """The norm around ``rsqrt(mean(x^2) + eps)``."""
    shifted = argument(inverse, 0, "input")
    if op_name(shifted) != "add":
        return None
    mean, eps = arguments(shifted)[:2]
    if is_number(mean):
        mean, eps = eps, mean
    if not is_number(eps) or op_name(mean) != "mean" or not argument(mean, 2, "keepdim", False):
        return None
    square = arguments(mean)[0]
    if argument(mean, 1, "dim") not in (-1, [-1], (-1,)):
        return None
    source = _squared(square)
    if source is None:
        return None
    scaled = _only_user(inverse)
    if scaled is None or op_name(scaled) != "mul" or source not in scaled.all_input_nodes:
        return None
    output, weight, offset = _with_weight(scaled)
    while op_name(source) in CASTS:
        source = arguments(source)[0]
    return NormSite("rms", source, output, weight, None, float(eps), offset)


def _squared(node: Node) -> Node | None:
    """x of ``x.pow(2)`` or ``x * x``."""
    left, right = argument(node, 0, "input"), argument(node, 1, "exponent")
    if (
        op_name(node) == "square"
        or (op_name(node) == "pow" and right == 2)
        or (op_name(node) == "mul" and left is right)
    ):
        return left
    return None


def _with_weight(scaled: Node) -> tuple[Node, Node | None, float]:
    """The end of a norm, past casts and at most one multiplication by a weight, and that weight."""
    node, end, weight, offset = scaled, scaled, None, 0.0
    while True:
        user = _only_user(node)
        if user is not None and op_name(user) in CASTS and arguments(user)[0] is node:
            node = user
            end = user
            continue
        if user is None or op_name(user) != "mul" or weight is not None:
            return end, weight, offset
        other = next((x for x in arguments(user)[:2] if x is not node), None)
        found = _weight_of(other)
        if found is None:
            return end, weight, offset
        (weight, offset), node, end = found, user, user


def _weight_of(node: object) -> tuple[Node, float] | None:
    """The placeholder behind a rank-1 factor and what is added to it."""
    offset = 0.0
    while isinstance(node, Node) and rank(node) == 1:
        if node.op in ("placeholder", "get_attr"):
            return node, offset
        if op_name(node) in CASTS:
            node = arguments(node)[0]
        elif op_name(node) == "add" and not offset:
            left, right = arguments(node)[:2]
            node, added = (right, left) if is_number(left) else (left, right)
            if not is_number(added):
                return None
            offset = float(added)
        else:
            return None
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
