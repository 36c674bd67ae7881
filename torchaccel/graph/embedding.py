"""The token ids that a graph looks up in its embedding."""

from __future__ import annotations

from torch.fx import Node

from .nodes import ancestors, argument, dtype, op_name, positions, rank, same_size, shape


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
