"""Every spelling of attention becomes one ``canonical.attention`` node over the un-repeated keys and values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Graph, Node

from torchaccel.graph import canonical
from torchaccel.graph.nodes import dtype, erase_dead, op_name, rank
from torchaccel.graph.propagate import annotate

from .attention_eager import last_matmul, read_eager
from .attention_match import (
    AttentionMatch,
    AttentionReason,
    MaskTerm,
    NotCanonical,
    check_heads,
    without_repetition,
)
from .attention_sdpa import read_sdpa

__all__ = ["AttentionReason", "AttentionRewrite", "canonicalize_attention"]


@dataclass(frozen=True)
class AttentionRewrite:
    """What became of one attention of the model.

    name: the model's node (the sdpa call, or the last matmul of an eager attention). source: "sdpa" or "eager".
    node: its canonical node, None when it was left alone; then ``reason`` and ``detail`` say why.
    """

    name: str
    source: str
    node: Node | None
    reason: AttentionReason | None = None
    detail: str = ""


def canonicalize_attention(graph: Graph) -> list[AttentionRewrite]:
    """Rewrites every attention of a Dynamo graph in place; exact but for float rounding.

    Returns one entry per attention found, in graph order, with the reason for each that was left alone.
    """
    found: list[AttentionRewrite] = []
    for node in list(graph.nodes):
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            found.append(_rewrite(graph, node, "sdpa", partial(read_sdpa, node)))
        elif name == "softmax":
            last = last_matmul(node)
            if last is not None:
                found.append(_rewrite(graph, last, "eager", partial(read_eager, node, last)))
    graph.lint()
    return found


def _rewrite(graph: Graph, node: Node, source: str, read: Callable[[], AttentionMatch]) -> AttentionRewrite:
    """Replaces one attention, whose result is ``node``, or says why not."""
    try:
        match = read()
        match.k, match.v = without_repetition(match.k, match.v)
        check_heads(match)
        _check_masks(match)
    except NotCanonical as stop:
        return AttentionRewrite(node.name, source, None, stop.reason, stop.detail)
    name = node.name
    with graph.inserting_before(node):
        mask = _merge_masks(graph, match)
        new = graph.call_function(
            canonical.attention,
            (match.q, match.k, match.v, mask),
            {"scale": match.scale, "causal": match.causal, "softcap": match.softcap},
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    for user in new.users:
        if op_name(user) == "view":
            # sdpa may lay its result out by token; a matmul's result was contiguous, which only ``view`` can tell.
            user.op, user.target = "call_method", "reshape"
    erase_dead(graph, [node])
    return AttentionRewrite(name, source, new)


def _check_masks(match: AttentionMatch) -> None:
    """Raises for masks that cannot be brought to one rank-4 mask."""
    for term in match.masks:
        if not rank(term.node) or (rank(term.node) or 0) > 4:
            raise NotCanonical(AttentionReason.UNKNOWN_MASK, f"{term.node.name} has rank {rank(term.node)}")
    if len(match.masks) > 1 and any(dtype(t.node) == torch.bool and t.fill is None for t in match.masks):
        raise NotCanonical(AttentionReason.UNKNOWN_MASK, "a bool mask is added to the scores")


def _merge_masks(graph: Graph, match: AttentionMatch) -> Node | None:
    """The one mask of an attention, rank 4, inserting nodes only where the model's own mask is not it already."""
    merged: Node | None = None
    for term in match.masks:
        mask = _as_added(graph, match.q, term)
        missing = 4 - (rank(mask) or 4)
        if missing:
            mask = annotate(graph.call_function(operator.getitem, (mask, (None,) * missing)))
        merged = mask if merged is None else annotate(graph.call_function(torch.add, (merged, mask)))
    return merged


def _as_added(graph: Graph, q: Node, term: MaskTerm) -> Node:
    """A mask that can be added to the scores (or the bool mask sdpa was given), from any term."""
    if term.fill is None:
        return term.node
    device = q.meta["example_value"].device
    zero = annotate(graph.call_function(torch.zeros, ((),), {"dtype": dtype(q), "device": device}))
    branches = (zero, term.fill) if term.keep else (term.fill, zero)
    return annotate(graph.call_function(torch.where, (term.node, *branches)))
