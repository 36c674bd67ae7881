"""Where a graph cuts images into patches: how many rows and columns of them there are."""

from __future__ import annotations

from torch.fx import Node

from .nodes import ancestors, hint, op_name, positions, rank, sizes


def find_patches(query: Node) -> Node | None:
    """The node ``[B, C, rows, columns]`` whose places become tokens of ``query`` ``[B, H, N, D]``; None without one.

    It is the last convolution before the queries, for as many images. That its places are all of the tokens, and in
    their order, is not known from here.
    """
    found = [node for node in ancestors([query]) if op_name(node) == "conv2d" and rank(node) == 4]
    if not found:
        return None
    last = max(found, key=positions(query.graph).__getitem__)
    return last if hint(sizes(last)[0]) == hint(sizes(query)[0]) else None
