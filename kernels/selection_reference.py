"""Summaries of keys, scores by them and the choice of blocks, in plain PyTorch, float32 inside, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from .spec import DTYPES


def allocate(spec: SummarySpec, batch: int, heads: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An uninitialised summary for ``capacity`` slots, and the sums that ``summarise`` keeps for the open block.

    The sums, float32 ``[B, H_kv, D]``, have no elements but for kind "mean".
    """
    summary = torch.empty(batch, heads, -(-capacity // spec.block), *spec.row, dtype=DTYPES[spec.stored], device=device)
    return summary, torch.empty(batch, heads, spec.head_dim if spec.kind == "mean" else 0, device=device)


def summarise(
    spec: SummarySpec,
    k_new: Tensor,
    summary: Tensor,
    sums: Tensor,
    lens: Tensor,
    first: Tensor | None = None,
    channels: Tensor | None = None,
) -> None:
    """Bring ``summary`` and ``sums`` up to date, in place, for keys appended after ``lens[1]`` slots.

    k_new: ``[B, H_kv, n, D]``. lens: int64 ``[3]`` on the CPU, see ``reference.decode_attention``; slots before
    ``lens[0]`` or ``first`` (int64 ``[B]``, first live slot of a row) count for nothing. channels: int32
    ``[B, H_kv, channels]`` for kind "channels".
    Means are of float32 sums in the order of the slots, so the result does not depend on how many tokens came at once:
    a mean rounded at every token would. After a rewind to ``length`` slots, call it with ``lens[1]`` the start of the
    open block, ``length // block * block``, and the keys from there on.
    Raises ``ValueError`` when the summary has no row for the new tokens.
    """
    start, end, _ = (int(x) for x in lens)
    batch, heads, n, dim = k_new.shape
    size = spec.block
    low, high = end // size, -(-(end + n) // size)
    if high > summary.shape[2]:
        raise ValueError(f"the summary has {summary.shape[2]} rows, but {high} are to be stored: grow it first")
    if not n:
        return
    k = k_new.to(DTYPES[spec.dtype]).float()
    if spec.kind == "channels":
        assert channels is not None
        summary[:, :, end : end + n] = k.gather(3, channels.long()[:, :, None].expand(-1, -1, n, -1)).to(summary.dtype)
        return
    before, after = end - low * size, high * size - end - n
    k = torch.nn.functional.pad(k, (0, 0, before, after)).unflatten(2, (-1, size))
    slots = torch.arange(low * size, high * size, device=k.device).unflatten(0, (-1, size))
    begin = _first(first, start, batch, k.device)[:, None, None]
    fresh = (slots >= torch.clamp(begin, min=end)) & (slots < end + n)  # [B, N, block]
    open_before = end > torch.clamp(begin, min=low * size)  # the first row holds live tokens already
    mask = fresh[:, None, :, :, None]
    rows = summary[:, :, low:high]
    if spec.kind == "minmax":
        least = k.masked_fill(~mask, torch.inf).amin(3)
        most = k.masked_fill(~mask, -torch.inf).amax(3)
        old = rows[:, :, 0].float()
        least[:, :, 0] = torch.where(open_before, torch.minimum(least[:, :, 0], old[:, :, 0]), least[:, :, 0])
        most[:, :, 0] = torch.where(open_before, torch.maximum(most[:, :, 0], old[:, :, 1]), most[:, :, 0])
        rows.copy_(torch.stack([least, most], 3))
        return
    total = torch.zeros(batch, heads, high - low, dim, device=k.device)
    total[:, :, 0] = torch.where(open_before, sums, total[:, :, 0])
    for j in range(size):
        total = torch.where(mask[:, :, :, j], total + k[:, :, :, j], total)
    live = (slots >= begin) & (slots < end + n)
    rows.copy_(total / live.sum(-1)[:, None, :, None])
    if after:
        sums.copy_(total[:, :, -1])


def scores(
    spec: SelectionSpec,
    q: Tensor,
    summary: Tensor,
    lens: Tensor,
    first: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """Score of every block of ``lens[1]`` slots, float32 ``[B, H_kv, ceil(lens[1] / block)]``; -inf for dead blocks.

    Arguments as in ``select``.
    """
    start, end, _ = (int(x) for x in lens)
    batch, _, n, _ = q.shape
    rows = -(-end // spec.summary.block)
    s = summary[:, :, :rows].float()
    x = q.float().unflatten(1, (-1, spec.group))  # [B, H_kv, G, Q, D]
    if spec.summary.kind == "channels":
        assert channels is not None
        x = x.gather(4, channels.long()[:, :, None, None].expand(-1, -1, spec.group, n, -1))
    begin = _first(first, start, batch, q.device)
    dead = (torch.arange(rows, device=q.device) < begin[:, None] // spec.summary.block)[:, None, None, None]
    if spec.summary.kind == "minmax":
        # What was never written must not turn a sum into NaN.
        s = s.masked_fill(dead[:, :, 0, 0, :, None, None], 0)
        d = torch.einsum("bhgqd,bhnd->bhgqn", x.clamp(max=0), s[..., 0, :])
        d = d + torch.einsum("bhgqd,bhnd->bhgqn", x.clamp(min=0), s[..., 1, :])
    else:
        d = torch.einsum("bhgqd,bhnd->bhgqn", x, s)
    d = d.masked_fill(dead, -torch.inf)
    if spec.reduce == "softmax":
        d = torch.softmax(d * spec.scale, -1).sum(2)
    else:
        d = d.amax(2) if spec.reduce == "max" else d.mean(2)
    d = d.amax(2).masked_fill(dead[:, :, 0, 0], -torch.inf)
    d = torch.nn.functional.pad(d, (0, -rows % spec.pool), value=-torch.inf).unflatten(-1, (-1, spec.pool)).amax(-1)
    return d.masked_fill(d.isnan(), torch.inf)


def select(
    spec: SelectionSpec,
    q: Tensor,
    summary: Tensor,
    lens: Tensor,
    first: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """The blocks that ``q`` ``[B, H, Q, D]`` reads of ``lens[1]`` stored slots: int32 ``[B, H_kv, width]``.

    Entries ascend, and -1 behind them is no entry: the ``index`` of ``reference.decode_attention``. summary: as
    ``summarise`` left it. lens: int64 ``[3]`` on the CPU; slots before ``lens[0]`` are not live. first: int64 ``[B]``,
    first live slot of every row (left padding). channels: int32 ``[B, H_kv, channels]`` for kind "channels".
    """
    start, end, _ = (int(x) for x in lens)
    got = scores(spec, q, summary, lens, first, channels)
    begin = _first(first, start, q.shape[0], q.device) // spec.block
    return choose(spec, got, begin[:, None], torch.full_like(begin, -(-end // spec.block))[:, None])


def choose(spec: SelectionSpec | PromptSelectionSpec, scores: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """The ``width`` best of the blocks ``begin .. end`` of every row of ``scores``, ascending, -1 for no entry.

    scores: float32 ``[..., N]`` without NaN. begin, end: int64, one for every row (or of a shape that broadcasts).
    """
    n = torch.arange(scores.shape[-1], device=scores.device)
    begin, end = begin[..., None], end[..., None]
    live = ((n >= begin) & (n < end)).expand(scores.shape)
    forced = live & ((n < begin + spec.sinks) | (n >= end - spec.recent))
    order = scores.argsort(stable=True, dim=-1, descending=True)
    rank = (live.int() + forced.int()).gather(-1, order)
    order = order.gather(-1, rank.argsort(stable=True, dim=-1, descending=True))
    width = spec.width or scores.shape[-1]
    kept = live.gather(-1, order) & (n < width)
    if spec.mass < 1:
        weights = scores.double().masked_fill(~live, 0 if spec.probabilities else -torch.inf)
        if not spec.probabilities and scores.shape[-1]:
            weights = torch.exp((weights - weights.amax(-1, keepdim=True)) * spec.scale)
        weights = weights.gather(-1, order)
        total = weights.sum(-1, keepdim=True)
        short = weights.cumsum(-1) - weights < spec.mass * total
        kept &= short | forced.gather(-1, order) | ~total.isfinite()
    entries = torch.where(kept, order, scores.shape[-1]).sort(-1).values
    entries = torch.nn.functional.pad(entries, (0, width), value=scores.shape[-1])[..., :width]
    return torch.where(entries == scores.shape[-1], -1, entries).int()


def prompt_scores(spec: PromptSelectionSpec, q: Tensor, k: Tensor, first: Tensor | None = None) -> Tensor:
    """What every block of queries is estimated to need of every block of keys: float32 ``[B, H, N, N]``.

    Arguments as in ``select_prompt``. Zero ("antidiagonal") or -inf ("mean") for blocks that are not seen.
    """
    batch, _, tokens, _ = q.shape
    size = spec.block if spec.estimate == "mean" else spec.stride
    blocks = -(-tokens // spec.block)
    padding = blocks * spec.block - tokens
    begin = _first(first, 0, batch, q.device)
    slots = torch.arange(blocks * spec.block, device=q.device)
    live = (slots >= begin[:, None]) & (slots < tokens)  # [B, S]
    parts = []
    for x in (q, k.repeat_interleave(spec.group, 1)):
        x = torch.nn.functional.pad(x.float(), (0, 0, 0, padding)).masked_fill(~live[:, None, :, None], 0)
        parts.append(x.unflatten(2, (-1, size)))
    count = live.unflatten(1, (-1, size)).sum(-1)  # live tokens of every row of tiles
    n = torch.arange(count.shape[1], device=q.device)
    seen = (n[:, None] >= n) & (count > 0)[:, None] & (count > 0)[:, :, None]
    seen = seen[:, None]
    if spec.estimate == "mean":
        qs, ks = (x.sum(3) / count.clamp(min=1)[:, None, :, None] for x in parts)
        got = torch.einsum("bhqd,bhkd->bhqk", qs, ks)
        if spec.softcap is not None:
            got = torch.tanh(got * (spec.scale / spec.softcap)) * (spec.softcap / spec.scale)
        got = got.masked_fill(~seen, -torch.inf)
        return got.masked_fill(got.isnan(), torch.inf)
    d = torch.einsum("bhqjd,bhkjd->bhqk", parts[0].flip(3), parts[1]) * (spec.scale / size)
    if spec.softcap is not None:
        d = torch.tanh(d / spec.softcap) * spec.softcap
    p = torch.softmax(d.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0)
    each = spec.block // size
    got = p.unflatten(3, (-1, each)).sum(4).unflatten(2, (-1, each)).sum(3)
    return got.masked_fill(got.isnan(), torch.inf)


def select_prompt(spec: PromptSelectionSpec, q: Tensor, k: Tensor, first: Tensor | None = None) -> Tensor:
    """The blocks of keys that every block of queries reads: int32 ``[B, H, ceil(S / block), width]``.

    q: ``[B, H, S, D]``. k: ``[B, H_kv, S, D]``. first: int64 ``[B]``, first live token of every row (left padding).
    Entries ascend, then -1: the ``index`` of ``reference.prefill_attention``.
    """
    got = prompt_scores(spec, q, k, first)
    blocks = torch.arange(got.shape[2], device=q.device)
    begin = _first(first, 0, q.shape[0], q.device) // spec.block
    return choose(spec, got, begin[:, None, None], (blocks + 1)[None, None])


def _first(first: Tensor | None, start: int, batch: int, device: torch.device) -> Tensor:
    """First live slot of every row: int64 ``[B]``."""
    if first is None:
        return torch.full((batch,), start, dtype=torch.int64, device=device)
    return first.to(device=device, dtype=torch.int64).clamp(min=start)
