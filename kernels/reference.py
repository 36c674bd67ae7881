"""The truth: every kernel of a spec in plain PyTorch, float32 inside, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kv_format
from .spec import AttentionSpec


def visible(spec: AttentionSpec, columns: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which keys each query may see by position and window: bool ``[B, 1, Q, K]``, or None when all may.

    columns: int64 ``[B, K]``, logical column of each key. queries: int64 ``[Q]``, logical column of each query.
    mask: the kernel's mask ``[B | 1, H | 1, Q, columns]`` (only used to find a row's first unmasked column).
    """
    if not spec.causal and spec.window is None:
        return None
    c, t = columns[:, None, None, :], queries[None, None, :, None]
    seen = c <= t if spec.causal else torch.ones_like(c <= t)
    if spec.window is not None:
        first = first_column(mask, columns.device)[:, None, None, None]
        seen = seen & ((c > t - spec.window) | (c < first + spec.sinks))
    return seen


def first_column(mask: Tensor | None, device: torch.device) -> Tensor:
    """First unmasked column of each batch row, int64 ``[B | 1]``: the left padding that sinks must skip."""
    if mask is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed[:, 0, -1].int().argmax(-1)


def attend(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, columns: Tensor, queries: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of q ``[B, H, Q, D]`` over k, v ``[B, H_kv, K, D]`` in float32; rows that see no key give zeros."""
    b, heads, n, _ = q.shape
    qf = q.float().unflatten(1, (heads // spec.group, spec.group))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", qf, k.float()).flatten(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    seen = visible(spec, columns, queries, mask)
    if mask is not None:
        wide = columns[:, None, None, :].expand(b, mask.shape[1], n, columns.shape[1])
        part = mask.expand(b, -1, -1, -1).gather(3, wide)
        scores = scores.masked_fill(~part, -torch.inf) if mask.dtype == torch.bool else scores + part.float()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - torch.where(top == -torch.inf, torch.zeros_like(top), top))
    total = p.sum(-1, keepdim=True)
    p = torch.where(total == 0, torch.zeros_like(p), p / total)
    out = torch.einsum("bhgqk,bhkd->bhgqd", p.unflatten(1, (-1, spec.group)), v.float())
    return out.flatten(1, 2).to(q.dtype)


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
) -> Tensor:
    """Append ``k_new``, ``v_new`` to the buffers in place, then attend over everything stored.

    q: ``[B, H, Q, D]``. k_new, v_new: ``[B, H_kv, Q, D]``; when None nothing is appended and slots ``lens[0]`` to
    ``lens[1]`` are attended as they are (a static cache, whose mask decides). k_buf, v_buf: of the spec's formats.
    lens: int64 ``[3]`` on the CPU: first live slot, end of the filled slots, logical length, all before the append.
    mask: ``[B | 1, H | 1, Q, columns]``, bool or additive, any strides; columns is ``logical + Q`` after an append.
    positions: int32 ``[B, C]``, column of each slot, updated in place; without it slot s is column ``s - start`` and
    the logical length is ``end - start``. Returns ``[B, H, Q, D]`` in q's dtype.
    """
    start, end, logical = (int(x) for x in lens)
    n = q.shape[2]
    queries = torch.arange(logical, logical + n, device=q.device)
    if k_new is not None and v_new is not None:
        kv_format.append(spec.key_format, k_buf, end, k_new)
        kv_format.append(spec.value_format, v_buf, end, v_new)
        if positions is not None:
            positions[:, end : end + n] = queries.to(positions.dtype)
        end += n
    if positions is None:
        columns = torch.arange(end - start, device=q.device).expand(q.shape[0], -1)
    else:
        columns = positions[:, start:end].long()
    k = kv_format.read(spec.key_format, k_buf, start, end, end)
    v = kv_format.read(spec.value_format, v_buf, start, end, end)
    return attend(spec, q, k, v, columns, queries, mask)


def prefill_attention(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a whole prompt over itself: q ``[B, H, S, D]``, k, v ``[B, H_kv, S, D]``, result like q."""
    columns = torch.arange(k.shape[2], device=q.device)
    return attend(spec, q, k, v, columns.expand(q.shape[0], -1), columns, mask)


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """``x @ W.T + b`` for each W: x ``[..., K]``, W ``[N, K]``, b ``[N]`` or None; summed in float32, in x's dtype."""
    flat = x.float()
    return [
        (flat @ w.float().T + (0 if b is None else b.float())).to(x.dtype) for w, b in zip(weights, biases, strict=True)
    ]
