"""Where a graph gets its embeddings from: the token ids it looks up, and the places it fills with other features."""

from __future__ import annotations

from torch.fx import Node

from .nodes import ancestors, argument, dtype, op_name, positions, rank, same_size, shape, sizes


def find_token_ids(query: Node, logits: Node | None) -> Node | None:
    """The integer node ``[B, N]`` of this call's token ids, or None where the graph is given embeddings.

    query: the queries of an attention. logits: what the graph returns, when known; its last dimension tells the
    vocabulary from tables of positions and token types, which are looked up alike.
    """
    above = ancestors([query])
    found = []
    for node, _ in sorted(positions(query.graph).items(), key=lambda entry: entry[1]):
        if node not in above or op_name(node) != "embedding":
            continue
        index, rows = argument(node, 0, "input"), (shape(argument(node, 1, "weight")) or (None,))[0]
        kind = dtype(index)
        if rank(index) != 2 or kind is None or kind.is_floating_point:
            continue
        if logits is None or same_size(rows, (shape(logits) or (None,))[-1]):
            found.append(index)
    # Where a table of positions has as many rows: models look up their tokens first.
    return found[0] if found else None


def find_filled(query: Node) -> tuple[Node, ...]:
    """The masks, bool ``[B, N, 1 | d]``, of the embeddings that are replaced by features of images or the like.

    query: the queries of an attention; ``masked_scatter`` on its way from the embeddings ``[B, N, d]`` is looked for.
    """
    filled = [node for node in ancestors([query]) if op_name(node) == "masked_scatter" and rank(node) == 3]
    order = positions(query.graph)
    masks = dict.fromkeys(argument(node, 1, "mask") for node in sorted(filled, key=order.__getitem__))
    return tuple(mask for mask in masks if rank(mask) == 3 and same_size(sizes(mask)[0], sizes(query)[0]))
