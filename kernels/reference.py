"""The truth: every kernel of a spec in plain PyTorch, float32 inside, any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import kv_format, latents, rotary
from .spec import AttentionSpec


def visible(
    spec: AttentionSpec, columns: Tensor, queries: Tensor, mask: Tensor | None, head_windows: Tensor | None = None
) -> Tensor | None:
    """Which keys each query may see by position and window: bool ``[B, 1 | H, Q, K]``, or None when all may.

    columns: int64 ``[B, 1 | H_kv, K]``, logical column of each key. queries: int64 ``[Q]``, that of each query. mask:
    the kernel's mask ``[B | 1, H | 1, Q, columns]`` (only used to find a row's first unmasked column).
    head_windows: int32 ``[H_kv]``, nonzero for heads bound by window and sinks; None binds all.
    """
    if not spec.causal and spec.window is None:
        return None
    c, t = per_head(columns, spec.group)[:, :, None, :], queries[None, None, :, None]
    seen = c <= t if spec.causal else torch.ones_like(c <= t)
    if spec.window is not None:
        first = first_column(mask, columns.device)[:, None, None, None]
        near = (c > t - spec.window) | (c < first + spec.sinks)
        if head_windows is not None:
            free = (head_windows == 0).repeat_interleave(spec.group)
            near = near | free[None, :, None, None]
        seen = seen & near
    return seen


def per_head(columns: Tensor, group: int) -> Tensor:
    """Columns ``[B, 1 | H_kv, K]`` as ``[B, 1 | H, K]``."""
    return columns if columns.shape[1] == 1 else columns.repeat_interleave(group, 1)


def by_column(mask: Tensor, columns: Tensor, group: int) -> Tensor:
    """The mask ``[B | 1, H | 1, Q, columns]`` for each key: ``[B, 1 | H, Q, K]``; columns as in ``visible``.

    Keys beyond the mask's columns, which are of tokens to come, are given that of the last one.
    """
    columns = per_head(columns, group)[:, :, None].clamp(max=mask.shape[3] - 1)
    rows, heads = columns.shape[0], max(columns.shape[1], mask.shape[1])
    return mask.expand(rows, heads, -1, -1).gather(3, columns.expand(rows, heads, mask.shape[2], -1))


def first_column(mask: Tensor | None, device: torch.device) -> Tensor:
    """First unmasked column of each batch row, int64 ``[B | 1]``: the left padding that sinks must skip."""
    if mask is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed[:, 0, -1].int().argmax(-1)


def listed(spec: AttentionSpec, index: Tensor, slots: int, fresh: int) -> Tensor:
    """Which of ``slots`` stored slots a list names: bool ``[B, H_kv, slots]``.

    index: int32 ``[B, H_kv, N]``, numbers of blocks (slots ``i * index_block ..``) or of slots; -1 is no entry, an
    entry must not stand twice. The newest ``fresh`` slots, those appended by the same call, are always read.
    """
    size = spec.index_block if spec.index == "blocks" else 1
    numbers = torch.arange(slots, device=index.device) // size
    # A column more takes the entries that are none.
    marks = torch.zeros(*index.shape[:2], -(-slots // size) + 1, dtype=torch.bool, device=index.device)
    marks.scatter_(2, torch.where(index < 0, marks.shape[2] - 1, index).long(), True)
    chosen = marks[:, :, numbers]
    chosen[:, :, slots - fresh :] = True
    return chosen


@dataclass(frozen=True)
class Attended:
    """Attention ``out`` ``[B, H, Q, D]``; ``lse`` float32 ``[B, H, Q]``; ``weights`` float32 ``[B, H, Q, K]``."""

    out: Tensor
    lse: Tensor
    weights: Tensor


def attend(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    queries: Tensor,
    mask: Tensor | None,
    head_windows: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Attended:
    """Attention of q ``[B, H, Q, D]`` over k, v ``[B, H_kv, K, D]`` in float32.

    chosen: bool ``[B, H_kv, K]`` or ``[B, H, Q, K]``, the keys that are read. Rows that see no key give zeros and a
    log-sum-exp of minus infinity. Other arguments: see ``visible``.
    """
    heads = q.shape[1]
    qf = q.float().unflatten(1, (heads // spec.group, spec.group))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", qf, k.float()).flatten(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    seen = visible(spec, columns, queries, mask, head_windows)
    if mask is not None:
        part = by_column(mask, columns, spec.group)
        scores = scores.masked_fill(~part, -torch.inf) if mask.dtype == torch.bool else scores + part.float()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if chosen is not None:
        if chosen.dim() == 3:
            chosen = chosen.repeat_interleave(spec.group, 1)[:, :, None]
        scores = scores.masked_fill(~chosen, -torch.inf)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    p = torch.where(total == 0, torch.zeros_like(p), p / total)
    out = torch.einsum("bhgqk,bhkd->bhgqd", p.unflatten(1, (-1, spec.group)), v.float())
    return Attended(out.flatten(1, 2).to(q.dtype), lse, p)


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
    """Append ``k_new``, ``v_new`` to the buffers in place, then attend over everything stored, or what ``index`` lists.

    q: ``[B, H, Q, D]``. k_new, v_new: ``[B, H_kv, Q, D]``; when None nothing is appended and slots ``lens[0]`` to
    ``lens[1]`` are attended as they are (a static cache, whose mask decides). k_buf, v_buf: of the spec's formats.
    lens: int64 ``[3]`` on the CPU: first live slot, end of the filled slots, logical length, all before the append.
    mask: ``[B | 1, H | 1, Q, columns]``, bool or additive, any strides; columns is ``logical + Q`` after an append.
    positions: int32 ``[B, 1 | H_kv, C]``, column of each slot, updated in place; without it slot s is column
    ``s - start`` and the logical length is ``end - start``. index: int32 ``[B, H_kv, N]``, see ``listed``.
    head_windows: int32 ``[H_kv]``. cos, sin: for specs that rotate q and k_new first, see ``rotary.rotated``.
    projection, table: for latent keys, see ``latents.rebuild``; k_new is ``[B, H_kv, Q, D + rank]`` then. The table is
    None where keys have no rotary embedding. value_projection: for latent values, likewise.
    Returns ``[B, H, Q, D]`` in q's dtype; with ``lse`` or ``mass`` a tuple with float32 ``[B, H, Q]`` and float32
    ``[B, H_kv, C]`` (probability that each slot got, summed over the group's heads and the queries; 0 for slots that
    are not filled or not read) behind it.
    """
    q = rotary.rotated(spec, q, cos, sin)
    start, end, logical = (int(x) for x in lens)
    n = q.shape[2]
    queries = torch.arange(logical, logical + n, device=q.device)
    fresh = 0
    if k_new is not None and v_new is not None:
        kv_format.append(spec.key_format, k_buf, end, rotary.rotated(spec, k_new, cos, sin))
        kv_format.append(spec.value_format, v_buf, end, v_new)
        if positions is not None:
            positions[..., end : end + n] = queries.to(positions.dtype)
        end += n
        fresh = n
    if positions is None:
        columns = torch.arange(end - start, device=q.device).expand(q.shape[0], 1, -1)
    else:
        columns = positions[..., start:end].long()
    if spec.key_format.kind == "latent":
        if projection is None:
            raise ValueError("latent keys are rebuilt by a projection; found none")
        # Every head is rebuilt from the latents of all, so they keep the same tokens.
        k = latents.read(spec.key_format, k_buf, start, end, end, projection, table, columns[:, 0])
    else:
        k = kv_format.read(spec.key_format, k_buf, start, end, end)
    if spec.value_format.kind == "latent":
        if value_projection is None:
            raise ValueError("latent values are rebuilt by a projection; found none")
        v = latents.read(spec.value_format, v_buf, start, end, end, value_projection)
    else:
        v = kv_format.read(spec.value_format, v_buf, start, end, end)
    chosen = None
    if spec.index != "contiguous":
        assert index is not None
        chosen = listed(spec, index, end, fresh)[:, :, start:]
    got = attend(spec, q, k, v, columns, queries, mask, head_windows, chosen)
    return _results(spec, got, kv_format.capacity(spec.key_format, k_buf), start)


def prefill_attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    index: Tensor | None = None,
    head_windows: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of a whole prompt over itself: q ``[B, H, S, D]``, k, v ``[B, H_kv, S, D]``, result like q.

    index: int32 ``[B, H, S / index_block, N]``, for every block of queries the blocks of keys it reads, -1 for none.
    head_windows: int32 ``[H_kv]``. Side results as in ``decode_attention``, with C = S.
    """
    tokens = k.shape[2]
    columns = torch.arange(tokens, device=q.device)
    chosen = None
    if spec.index == "blocks":
        assert index is not None
        chosen = torch.stack([listed(spec, part, tokens, 0) for part in index.unbind(2)], 2)
        chosen = chosen.repeat_interleave(spec.index_block, 2)[:, :, :tokens]
    got = attend(spec, q, k, v, columns.expand(q.shape[0], 1, -1), columns, mask, head_windows, chosen)
    return _results(spec, got, tokens, 0)


def _results(spec: AttentionSpec, got: Attended, slots: int, start: int) -> Tensor | tuple[Tensor, ...]:
    results = [got.out]
    if spec.lse:
        results.append(got.lse)
    if spec.mass:
        mass = got.weights.unflatten(1, (-1, spec.group)).sum((2, 3))
        results.append(torch.nn.functional.pad(mass, (start, slots - start - mass.shape[2])))
    return results[0] if len(results) == 1 else tuple(results)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint sets of keys, from that over each: (out, lse) of every one.

    out: ``[B, H, Q, D]`` normalised. lse: float32 ``[B, H, Q]``, minus infinity for an empty set.
    """
    lses = torch.stack([lse for _, lse in parts])
    top = lses.amax(0)
    weights = torch.exp(lses - torch.where(top == -torch.inf, torch.zeros_like(top), top))
    total = weights.sum(0)
    out = sum(w[..., None] * o.float() for w, (o, _) in zip(weights, parts, strict=True))
    out = torch.where(total[..., None] == 0, torch.zeros_like(out), out / total[..., None])
    return out.to(parts[0][0].dtype), torch.where(total == 0, -torch.inf, top + total.log())


def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """``x @ W.T + b`` for each W: x ``[..., K]``, W ``[N, K]``, b ``[N]`` or None; summed in float32, in x's dtype."""
    flat = x.float()
    return [
        (flat @ w.float().T + (0 if b is None else b.float())).to(x.dtype) for w, b in zip(weights, biases, strict=True)
    ]
