"""What a policy wants to see of a prompt, and of later calls, as further results of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from torchaccel.graph.anatomy import Anatomy, AttentionSite
from torchaccel.graph.nodes import CASTS, dtype, op_name
from torchaccel.graph.propagate import annotate
from torchaccel.graph.rotary import rotation_of
from torchaccel.runtime.bindings import PromptBinding
from torchaccel.runtime.eviction import Eviction
from torchaccel.runtime.mixing import Mixing

ALL = slice(None)
LAST_TWO = (Ellipsis, slice(-2, None), ALL)


def prompt_outputs(
    graph: Graph,
    anatomy: Anatomy,
    site: AttentionSite,
    policy: Eviction | Mixing,
    mass: Node | None,
    ids: Node | None,
    extra_output: Callable[[Node], int],
) -> PromptBinding:
    """Add what ``policy`` wants of ``site`` to the graph; extra_output: makes a node a result and tells its place.

    mass: the attention every token received, ids: of the tokens; when the policy wants them.
    """
    layer = site.index if site.layer is None else site.layer
    with graph.inserting_before(graph.output_node()):
        last = part_of(
            graph, site.q, (ALL, ALL, slice(-policy.last_queries, None) if policy.last_queries else slice(0, 0))
        )
        mask = None if site.mask is None else part_of(graph, site.mask, (ALL, slice(0, 1), slice(-1, None)))
        rotation = rotation_of(site.q) if policy.unrotated else None
        # The last two positions: what a position adds to the angles is their difference.
        tables = (
            [part_of(graph, _precise(table), LAST_TWO) for table in (rotation.cos, rotation.sin)] if rotation else []
        )
        masks = [part_of(graph, mask, (ALL, ALL, 0)) for mask in anatomy.filled] if policy.images else []
    plain = (rotation.x if rotation else site.q) if policy.unrotated else None
    return PromptBinding(
        extra_output(last),
        None if mass is None else extra_output(mass),
        None if mask is None else extra_output(mask),
        float(site.scale),
        layer,
        len(anatomy.layers) or len(anatomy.attentions),
        None if plain is None else extra_output(plain),
        (extra_output(tables[0]), extra_output(tables[1])) if tables else None,
        rotation.style if rotation else "half",
        None if ids is None else extra_output(ids),
        tuple(extra_output(mask) for mask in masks),
    )


def _precise(table: Node) -> Node:
    """The table ``[.., S, R]`` before it was rounded to the model's dtype: differences of angles are small."""
    node = table
    while op_name(node) in (*CASTS, "unsqueeze", "getitem") and isinstance(node.args[0], Node):
        node = node.args[0]
        if dtype(node) == torch.float32 and dtype(table) != torch.float32:
            return node
    return table


def part_of(graph: Graph, node: Node, index: tuple[Any, ...]) -> Node:
    """The node that reads ``index`` of ``node``, one for all sites that want it."""
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem and user.args[1] == index:
            return user
    made = graph.call_function(operator.getitem, (node, index))
    annotate(made)
    return made
