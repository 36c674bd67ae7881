"""Canonical node targets: one plain function per concept, whose body is the exact reference in stock torch operators.

A canonical node that nothing lowers still traces through AOTAutograd into the best dense path of stock torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped queries: ``softmax(cap(q k^T * scale) + mask) v``.

    q: ``[B, H, Q, D]``. k: ``[B, H_kv, K, D]`` and v: ``[B, H_kv, K, D_v]`` with H a multiple of H_kv: query head h
    reads key head ``h // (H / H_kv)``. mask: broadcastable to ``[B, H, Q, K]``; bool keeps where True, float is added
    to the capped scores. causal: query i sees keys 0..i (asked for only where Q == K). softcap: scores become
    ``softcap * tanh(scores / softcap)`` before the mask. Returns ``[B, H, Q, D_v]`` in q's dtype.
    """
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = _repeat_heads(k, group), _repeat_heads(v, group)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def _repeat_heads(x: Tensor, group: int) -> Tensor:
    """``[B, H_kv, K, D]`` -> ``[B, H_kv * group, K, D]``, each head ``group`` times in a row."""
    b, heads, n, d = x.shape
    return x[:, :, None].expand(b, heads, group, n, d).reshape(b, heads * group, n, d)
