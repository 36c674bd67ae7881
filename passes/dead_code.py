"""Removes nodes nobody reads, keeping in-place writes: at this level they are methods whose result may be unused."""

from __future__ import annotations

from torch.fx import Graph, Node

from torchaccel.graph.nodes import writes_in_place


def remove_dead_code(graph: Graph) -> None:
    """Erase unread nodes in place (FX's own elimination would drop ``index_copy_`` into a static cache)."""
    graph.eliminate_dead_code(is_impure_node=_has_effects)


def _has_effects(node: Node) -> bool:
    return node.is_impure() or writes_in_place(node)
