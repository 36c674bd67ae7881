"""What some rows of a prompt attend to, summed over lines or over blocks: plain PyTorch, any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .spec import AttentionSpec


def line_scores(spec: AttentionSpec, q: Tensor, k: Tensor, count: int, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the last ``count`` rows give every column, and every diagonal by its offset: float32 ``[B, H, S]`` each.

    q: ``[B, H, S, D]``. k: ``[B, H_kv, S, D]``. first: int64 ``[B]``, first live token of every batch row, or
    None for zeros; rows before it give nothing. The diagonal of offset o holds the pairs of a query and the key o
    tokens before it. Of spec, head_dim, group, dtype, scale and softcap matter.
    """
    rows = last_rows(q.shape[2], count, q.shape[0], q.device)
    columns, diagonals = zip(*(_lines(weights) for weights in _weights(spec, q, k, rows, first)), strict=True)
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def block_weights(spec: AttentionSpec, q: Tensor, k: Tensor, rows: Tensor, first: Tensor | None, block: int) -> Tensor:
    """What ``rows`` give every block of ``block`` keys: float32 ``[B, H, R, ceil(S / block)]``.

    rows: int64 ``[B, R]``, positions. Other arguments as of ``line_scores``.
    """
    return torch.cat([pooled(weights, block) for weights in _weights(spec, q, k, rows, first)], 1)


def set_weights(spec: AttentionSpec, q: Tensor, k: Tensor, rows: Tensor, ends: Tensor, first: Tensor | None) -> Tensor:
    """What the rows of every set give every key together: float32 ``[B, H, M, N]``.

    k: ``[B, H_kv, N, D]``, of which a row sees those from ``first`` to before its end. rows: int64 ``[B, M, R]``,
    positions in q. ends: the same, 0 for a row that counts for nothing.
    """
    found = [
        torch.cat([weights.sum(2) for weights in _weights(spec, q, k, of_set, first, end)], 1)
        for of_set, end in zip(rows.unbind(1), ends.unbind(1), strict=True)
    ]
    return torch.stack(found, 2)


def last_rows(tokens: int, count: int, batch: int, device: torch.device) -> Tensor:
    """Positions of the last ``count`` of ``tokens`` tokens, or of all: int64 ``[B, R]``."""
    return torch.arange(max(0, tokens - count), tokens, device=device).expand(batch, -1)


def pooled(x: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension, the last one as long as it is: ``[..., ceil(S / block)]``."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def _weights(
    spec: AttentionSpec, q: Tensor, k: Tensor, rows: Tensor, first: Tensor | None, ends: Tensor | None = None
) -> Iterator[Tensor]:
    """Attention weights ``[B, G, R, S]`` of one KV head after another: their memory is that of one."""
    batch, heads, _, dim = q.shape
    columns = torch.arange(k.shape[2], device=q.device)
    ends = rows + 1 if ends is None else ends
    begin = rows.new_zeros(batch) if first is None else first
    hidden = ((columns >= ends[:, :, None]) | (columns < begin[:, None, None]))[:, None]
    dead = (ends <= begin[:, None])[:, None, :, None]
    place = rows[:, None, :, None].expand(-1, heads, -1, dim)
    asking = q.gather(2, place).float()
    for head in range(k.shape[1]):
        of_group = asking[:, head * spec.group : (head + 1) * spec.group]
        scores = (of_group.flatten(1, 2) @ k[:, head].float().transpose(1, 2)).unflatten(1, (spec.group, -1))
        scores = scores * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        yield scores.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(dead, 0)


def _lines(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the columns and over the diagonals of the last R rows ``[B, G, R, S]``."""
    rows, tokens = weights.shape[2:]
    # Row r moved right by R - 1 - r: then diagonals are columns, from the longest offset to none.
    padded = torch.nn.functional.pad(weights, (rows - 1, 0)).contiguous()
    batch, head, _, _ = padded.stride()
    moved = padded.as_strided(weights.shape, (batch, head, tokens + rows, 1))
    return weights.sum(2), moved.sum(2).flip(-1)
