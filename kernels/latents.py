"""Keys and values rebuilt from the latents of a token: the format "latent", after CSKV (arXiv 2409.10593)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kv_format
from .spec import DTYPES, KVFormat


def rank_of(density: float, head_dim: int) -> int:
    """Latents of a head of which the share ``density`` of its numbers stays."""
    return max(1, int(density * head_dim))


def rebuild(latents: Tensor, projection: Tensor, rotary: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """The keys or values ``[B, H, n, D]``, float32, of tokens whose heads hold ``latents`` ``[B, H, n, rank]``.

    projection: ``[H, H * rank, D]``, each head's keys before the rotary embedding, or values, from the latents of all
    heads, one head's behind the other's. rotary: ``[2, B | 1, columns, R]``, cosine and sine of every logical column
    for the first R channels of a key, of which channels i and i + R / 2 are turned together; None for what is not
    turned. columns: int64 ``[B, n]``, the tokens'.
    """
    shared = latents.transpose(1, 2).flatten(2).float()
    tokens = torch.einsum("bnr,hrd->bhnd", shared, projection.float())
    if rotary is None or columns is None:
        return tokens
    size = rotary.shape[-1]
    wide = columns[None, :, :, None].expand(2, -1, -1, size)
    cos, sin = rotary.float().expand(-1, columns.shape[0], -1, -1).gather(2, wide).unsqueeze(2)
    turned, rest = tokens[..., :size], tokens[..., size:]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def read_wide(
    fmt: KVFormat,
    buf: Tensor,
    start: int,
    end: int,
    filled: int,
    projection: Tensor,
    rotary: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Slots ``start .. end`` as they are appended, ``[B, H, end - start, D + rank]``: tokens, and behind them latents.

    Tokens are rebuilt, or exact where they are in the tail. columns: int64 ``[B, end - start]``. Other arguments as in
    ``rebuild`` and ``kv_format.read``.
    """
    parts, done = [], min(end, fmt.quantised(filled))
    if start < done:
        latents = kv_format.blocks(fmt, buf)[0].flatten(2, 3)[:, :, start:done]
        of_blocks = None if columns is None else columns[:, : done - start]
        parts.append(torch.cat([rebuild(latents, projection, rotary, of_blocks).to(DTYPES[fmt.dtype]), latents], -1))
    parts.append(kv_format.read(fmt, buf, max(start, done), max(end, done), filled))
    return torch.cat(parts, 2)


def read(
    fmt: KVFormat,
    buf: Tensor,
    start: int,
    end: int,
    filled: int,
    projection: Tensor,
    rotary: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """The tokens in slots ``start .. end`` as ``[B, H, end - start, D]``; arguments as in ``read_wide``."""
    return read_wide(fmt, buf, start, end, filled, projection, rotary, columns)[..., : fmt.head_dim]
