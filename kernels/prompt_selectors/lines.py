"""Columns and diagonals of a prompt's attention, scored by a few of its rows: plain PyTorch, any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..spec import AttentionSpec

Found = TypeVar("Found")


def row_weights(
    spec: AttentionSpec, q: Tensor, k: Tensor, rows: Tensor, first: Tensor | None, reduce: Callable[[Tensor], Found]
) -> list[Found]:
    """``reduce`` of the attention weights of ``rows``, one KV head after another: their memory is that of one.

    q: ``[B, H, S, D]``. k: ``[B, H_kv, S, D]``. rows: int64 ``[B, R]``, positions. first: as of
    ``PromptSelector.select``. reduce: gets float32 ``[B, G, R, S]``, zeros for rows in the padding, and may keep none.
    """
    batch, heads, tokens, dim = q.shape
    columns = torch.arange(tokens, device=q.device)
    begin = rows.new_zeros(batch) if first is None else first
    hidden = ((columns > rows[:, :, None]) | (columns < begin[:, None, None]))[:, None]
    dead = (rows < begin[:, None])[:, None, :, None]
    place = rows[:, None, :, None].expand(-1, heads, -1, dim)
    asking = q.gather(2, place).float() * spec.scale
    found = []
    for head in range(k.shape[1]):
        of_group = asking[:, head * spec.group : (head + 1) * spec.group]
        scores = (of_group.flatten(1, 2) @ k[:, head].float().transpose(1, 2)).unflatten(1, (spec.group, -1))
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        found.append(reduce(weights.masked_fill_(dead, 0)))
    return found


def last_rows(tokens: int, count: int, batch: int, device: torch.device) -> Tensor:
    """Positions of the last ``count`` of ``tokens`` tokens, or of all: int64 ``[B, R]``."""
    return torch.arange(max(0, tokens - count), tokens, device=device).expand(batch, -1)


def line_scores(spec: AttentionSpec, q: Tensor, k: Tensor, count: int, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the last ``count`` rows give every column, and every diagonal by its offset: float32 ``[B, H, S]`` each.

    The diagonal of offset o holds the pairs of a query and the key o tokens before it. Arguments as of ``row_weights``.
    """
    rows = last_rows(q.shape[2], count, q.shape[0], q.device)
    columns, diagonals = zip(*row_weights(spec, q, k, rows, first, _lines), strict=True)
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def _lines(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the columns and over the diagonals of the last R rows ``[B, G, R, S]``."""
    rows, tokens = weights.shape[2:]
    # Row r moved right by R - 1 - r: then diagonals are columns, from the longest offset to none.
    padded = torch.nn.functional.pad(weights, (rows - 1, 0)).contiguous()
    batch, head, _, _ = padded.stride()
    moved = padded.as_strided(weights.shape, (batch, head, tokens + rows, 1))
    return weights.sum(2), moved.sum(2).flip(-1)


def live_tokens(tokens: int, first: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Which tokens are no padding: bool ``[B, S]``."""
    places = torch.arange(tokens, device=device).expand(batch, -1)
    return places >= (0 if first is None else first[:, None])


def top(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the largest scores ``[B, H, S]``, and which are among the ``counts`` ``[H | 1]`` best of a head.

    counts lie on the CPU. Scores of minus infinity are none of the best.
    """
    most = min(int(counts.max()), scores.shape[-1])
    best = scores.topk(most, -1)
    chosen = (torch.arange(most) < counts[:, None]).to(scores.device)
    return best.indices, chosen & (best.values > -torch.inf)


def marked(places: Tensor, chosen: Tensor, blocks: int) -> Tensor:
    """Which of ``blocks`` blocks hold a chosen place: bool ``[B, H, N]``; places ``[B, H, n]`` count blocks."""
    flags = torch.zeros(*places.shape[:2], blocks, dtype=torch.int8, device=places.device)
    return flags.scatter_reduce_(2, places.clamp(max=blocks - 1), chosen.to(torch.int8), "amax").bool()


def diagonal_blocks(offsets: Tensor, chosen: Tensor, block: int, blocks: int) -> Tensor:
    """Which block diagonals the diagonals of chosen offsets ``[B, H, n]`` cross: bool ``[B, H, N]``.

    A line that is no multiple of a block crosses two: the block it starts in, and the one before.
    """
    before = (offsets + block - 1) // block
    return marked(offsets // block, chosen, blocks) | marked(before, chosen & (before < blocks), blocks)


def pooled(x: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension, the last one as long as it is: ``[..., ceil(S / block)]``."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)
