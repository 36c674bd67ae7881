"""Puts one operator in the place of every chosen group."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torchaccel.kernels.fused_spec import FusedSpec

from torchaccel.graph.nodes import shape

from .groups import Group


def rewrite_group(graph: Graph, group: Group, spec: FusedSpec, replaced: dict[Node, Node]) -> None:
    """Replace a group by one call of ``torchaccel::fused_rows``, in place; dead nodes stay for the caller to remove.

    spec: the group's, whose inputs and outputs are in the group's order. replaced: results of groups that were
    rewritten before, from the value they stood for; this group's are added.
    """
    inputs = [replaced.get(node, node) for node in group.inputs]
    order = {node: place for place, node in enumerate(graph.nodes)}
    target = torch.ops.torchaccel.fused_rows.default
    with graph.inserting_after(max(inputs, key=order.__getitem__)):
        call = graph.call_function(target, (inputs, spec.key()))
    place = call
    for index, (value, seen) in enumerate(group.results.items()):
        with graph.inserting_after(place):
            result = place = graph.call_function(operator.getitem, (call, index))
        result.meta = dict(seen[0].meta)
        replaced[value] = result
        for node in seen:
            view = result
            if shape(node) != shape(result):
                with graph.inserting_after(place):
                    view = place = graph.call_method("reshape", (result, shape(node)))
                view.meta = dict(node.meta)
            node.replace_all_uses_with(view)
        # Groups that were rewritten before this one read the value itself, in whatever shape.
        value.replace_all_uses_with(result, delete_user_cb=lambda user: user.target is target)
