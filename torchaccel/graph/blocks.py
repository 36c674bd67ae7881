"""The blocks inside layers: norms, feed-forward blocks, and where the residual stream can be cut between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Graph, Node

from .anatomy import Anatomy, Layer
from .mlps import MlpSite, find_mlps
from .nodes import ancestors, descendants, op_name, positions, same_shape
from .norms import NormSite, find_norms
from .streams import STREAM, stream_back

__all__ = ["Blocks", "MlpSite", "NormSite", "Sublayer", "find_blocks"]


@dataclass(frozen=True)
class Sublayer:
    """A stretch of the residual stream within one layer: replacing ``output`` by ``input`` skips it.

    kind: "attention", "mlp" (anything that is not attention, experts included) or "both" for layers that run them side
    by side. input, output: ``[B, N, d]``. layer: index into ``Anatomy.layers``.
    """

    kind: Literal["attention", "mlp", "both"]
    layer: int
    input: Node
    output: Node


@dataclass(frozen=True)
class Blocks:
    """Norms of the whole graph; of each layer, its sublayers and its feed-forward block (None if not a plain one)."""

    norms: list[NormSite]
    mlps: list[MlpSite | None]
    sublayers: list[Sublayer]


def find_blocks(graph: Graph, anatomy: Anatomy) -> Blocks:
    """Blocks of a canonicalised graph; reads only."""
    order = positions(graph)
    mlps, sublayers = [], []
    for layer in anatomy.layers:
        found = find_mlps(layer.nodes)
        mlps.append(found[0] if len(found) == 1 else None)
        sublayers.extend(_sublayers(layer, order))
    return Blocks(find_norms(graph), mlps, sublayers)


def _sublayers(layer: Layer, order: dict[Node, int]) -> list[Sublayer]:
    """Attention and feed-forward part of a layer, cut at the stream node that all paths between them cross."""
    if layer.attention is None:
        return [Sublayer("mlp", layer.index, layer.input, layer.output)]
    reached = stream_back([layer.output], stop=lambda node: node is layer.input)
    after = descendants([layer.attention.node])
    inside = descendants([layer.input]) & ancestors([layer.output])
    cuts = [
        node
        for node in reached
        if node in inside
        and node in after
        and node is not layer.output
        and same_shape(node, layer.input)
        and _is_cut(node, layer, inside)
        and not _only_stream_work(node, layer.output, inside)
    ]
    if not cuts:
        return [Sublayer("both", layer.index, layer.input, layer.output)]
    middle = max(cuts, key=order.__getitem__)
    return [
        Sublayer("attention", layer.index, layer.input, middle),
        Sublayer("mlp", layer.index, middle, layer.output),
    ]


def _is_cut(cut: Node, layer: Layer, inside: set[Node]) -> bool:
    """Whether every path from a layer's input to its output crosses a node."""
    pending, seen = [layer.input], {layer.input, cut}
    while pending:
        for user in pending.pop().users:
            if user is layer.output:
                return False
            if user in inside and user not in seen:
                seen.add(user)
                pending.append(user)
    return True


def _only_stream_work(start: Node, end: Node, inside: set[Node]) -> bool:
    """Whether nothing but norms, adds and reshapes lies between two nodes."""
    between = descendants([start]) & ancestors([end]) & inside
    return all(op_name(node) in STREAM for node in between - {start})
