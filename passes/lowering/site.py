"""What every lowering does with an attention site: reads its sizes, puts an operator in its place, names its layout."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.layout import Layout


def replace_site(
    graph: Graph, site: AttentionSite, target: Callable[..., Any], args: tuple[Any, ...], *sides: int
) -> list[Node]:
    """Put an operator in the place of a site; ``sides``: which results to return of one that has several."""
    with graph.inserting_before(site.node):
        node = graph.call_function(target, args)
        received = [graph.call_function(operator.getitem, (node, side)) for side in sides]
        if sides:
            node = graph.call_function(operator.getitem, (node, 0))
    node.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(node)
    graph.erase_node(site.node)
    return received


def site_shape(site: AttentionSite, tokens: int, sites: int) -> AttentionShape:
    """The sizes of a site, with ``tokens`` stored, for the cost model; ``sites``: the attention layers of the graph."""
    batch, _, queries, _ = (size_of(size) for size in fake(site.q).shape)
    # A turn may be longer than what is stored before it; it sees itself.
    return AttentionShape(batch, site.kv_heads, queries, max(tokens, queries), sites=sites)


def describe(layout: Layout) -> str:
    """A layout in a few words, for the report."""
    if layout.mixing is not None:
        return f"{layout.format.kind}, then {' or '.join(keys.kind for keys, _ in layout.mixing.formats)}"
    kept = f" {type(layout.eviction).__name__}" if layout.eviction else " pruned" if layout.pruned else ""
    return layout.format.kind + kept + (f" {type(layout.selection).__name__}" if layout.selection else "")


def fake(node: Node) -> Any:
    """The example value of a node."""
    return node.meta["example_value"]


def size_of(size: Any) -> int:
    """A size as a number; of a symbolic one, what it was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def size_node(node: Node, dim: int) -> int | Node:
    """A size of a node for the arguments of another, which is inserted where the graph's cursor stands."""
    size = fake(node).shape[dim]
    if isinstance(size, int):
        return size
    found = node.graph.call_method("size", (node, dim))
    found.meta["example_value"] = size
    return found


def static(size: Any) -> int | None:
    """A size that is the same in every call, or None."""
    return size if isinstance(size, int) else None
