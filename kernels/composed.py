"""Attention over a cache composed of stock operators: for many new tokens at once, where dense GEMM kernels win."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kv_format, reference, rotary
from .spec import AttentionSpec


def decode_attention(
    spec: AttentionSpec,
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    index: Tensor | None = None,
    head_windows: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    projection: Tensor | None = None,
    table: Tensor | None = None,
    value_projection: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Append, read the cache back and call scaled_dot_product_attention; arguments as in the reference."""
    if beyond_sdpa(spec) or k_new is None or v_new is None:
        more = index, head_windows, cos, sin, projection, table, value_projection
        return reference.decode_attention(spec, q, k_new, v_new, k_buf, v_buf, lens, mask, positions, *more)
    q, k_new = rotary.rotated(spec, q, cos, sin), rotary.rotated(spec, k_new, cos, sin)
    start, end, logical = (int(x) for x in lens)
    n = q.shape[2]
    kv_format.append(spec.key_format, k_buf, end, k_new)
    kv_format.append(spec.value_format, v_buf, end, v_new)
    k = kv_format.read(spec.key_format, k_buf, start, end + n, end + n)
    v = kv_format.read(spec.value_format, v_buf, start, end + n, end + n)
    queries = torch.arange(logical, logical + n, device=q.device)
    if positions is None:
        columns = torch.arange(k.shape[2], device=q.device).expand(q.shape[0], 1, -1)
    else:
        positions[..., end : end + n] = queries.to(positions.dtype)
        columns = positions[..., start : end + n].long()
    # Before the mask is brought into slot order: sinks are counted in its columns.
    seen = reference.visible(spec, columns, queries, mask)
    if positions is not None and mask is not None:
        mask = reference.by_column(mask, columns, spec.group)
    mask = _combine(mask, seen, q.dtype)
    # The operator promises a contiguous result; sdpa's has the layout its kernel liked.
    return F.scaled_dot_product_attention(q, k, v, mask, scale=spec.scale, enable_gqa=True).contiguous()


def prefill_attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    index: Tensor | None = None,
    head_windows: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of a prompt over itself by scaled_dot_product_attention; arguments as in the reference."""
    if beyond_sdpa(spec):
        return reference.prefill_attention(spec, q, k, v, mask, index, head_windows)
    if spec.causal and spec.window is None and mask is None:
        # Without a mask tensor flash kernels run it.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True).contiguous()
    columns = torch.arange(k.shape[2], device=q.device)
    mask = _combine(mask, reference.visible(spec, columns.expand(q.shape[0], 1, -1), columns, mask), q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=spec.scale, enable_gqa=True).contiguous()


def beyond_sdpa(spec: AttentionSpec) -> bool:
    """Whether the spec asks for what scaled_dot_product_attention cannot do, so that only the reference remains."""
    latent = "latent" in (spec.key_format.kind, spec.value_format.kind)
    return (
        spec.softcap is not None or spec.index != "contiguous" or spec.head_windows or spec.lse or spec.mass or latent
    )


def _combine(mask: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or seen is None:
        return seen if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.to(dtype).masked_fill(~seen, -torch.inf)
