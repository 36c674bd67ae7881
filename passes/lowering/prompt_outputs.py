"""What a policy that evicts tokens wants to see of a prompt, as further results of its graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.propagate import annotate
from torchaccel.runtime.bindings import PromptBinding
from torchaccel.runtime.eviction import Eviction

ALL = slice(None)


def prompt_outputs(
    graph: Graph,
    site: AttentionSite,
    policy: Eviction,
    mass: Node | None,
    layer: tuple[int, int],
    extra_output: Callable[[Node], int],
) -> PromptBinding:
    """Add what ``policy`` wants of ``site`` to the graph; extra_output: makes a node a result and tells its place.

    mass: the attention every token received, when the policy wants it. layer: which one of how many.
    """
    with graph.inserting_before(graph.output_node()):
        last = _slice(
            graph, site.q, (ALL, ALL, slice(-policy.last_queries, None) if policy.last_queries else slice(0, 0))
        )
        mask = None if site.mask is None else _slice(graph, site.mask, (ALL, slice(0, 1), slice(-1, None)))
    return PromptBinding(
        extra_output(last),
        None if mass is None else extra_output(mass),
        None if mask is None else extra_output(mask),
        float(site.scale),
        *layer,
    )


def _slice(graph: Graph, node: Node, index: tuple[Any, ...]) -> Node:
    """The node that reads ``index`` of ``node``, one for all sites that want it."""
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem and user.args[1] == index:
            return user
    made = graph.call_function(operator.getitem, (node, index))
    annotate(made)
    return made
