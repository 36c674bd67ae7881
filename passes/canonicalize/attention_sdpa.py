"""Reads ``scaled_dot_product_attention`` calls."""

from __future__ import annotations

from torch.fx import Node

from torchaccel.graph.nodes import argument, is_number, rank, same_size, sizes

from .attention_match import AttentionMatch, AttentionReason, MaskTerm, NotCanonical


def read_sdpa(node: Node) -> AttentionMatch:
    """Arguments of one sdpa call, however they were passed; raises NotCanonical."""
    q, k, v = (argument(node, place, name) for place, name in enumerate(("query", "key", "value")))
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise NotCanonical(AttentionReason.DROPOUT, f"dropout_p={argument(node, 4, 'dropout_p')}")
    for label, tensor in (("q", q), ("k", k), ("v", v)):
        if rank(tensor) != 4:
            raise NotCanonical(AttentionReason.RANK_NOT_FOUR, f"{label} has rank {rank(tensor)}")
    queries, width = sizes(q)[2:]
    scale = argument(node, 6, "scale")
    if scale is None and isinstance(width, int):
        scale = width**-0.5
    if not is_number(scale):
        raise NotCanonical(AttentionReason.UNKNOWN_SCORES, f"scale {scale} is not a number")
    causal = argument(node, 5, "is_causal", False)
    if causal is not False and causal is not True:
        raise NotCanonical(AttentionReason.UNKNOWN_MASK, f"is_causal={causal} is not a constant")
    if causal and not same_size(queries, sizes(k)[2]):
        detail = f"is_causal over {queries} queries and {sizes(k)[2]} keys"
        raise NotCanonical(AttentionReason.CAUSAL_NOT_SQUARE, detail)
    mask = argument(node, 3, "attn_mask")
    masks = [MaskTerm(mask)] if isinstance(mask, Node) else []
    return AttentionMatch(q, k, v, float(scale), masks, causal)
