"""Keys rebuilt from the latents of a token: the format "latent", after CSKV (arXiv 2409.10593)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kv_format
from .spec import DTYPES, KVFormat


def rebuild(latents: Tensor, projection: Tensor, rotary: Tensor, columns: Tensor) -> Tensor:
    """The keys ``[B, H, n, D]``, float32, of tokens whose heads hold ``latents`` ``[B, H, n, rank]``.

    projection: ``[H, H * rank, D]``, each head's keys before the rotary embedding from the latents of all heads, one
    head's behind the other's. rotary: ``[2, B | 1, columns, R]``, cosine and sine of every logical column for the first
    R channels of a key, of which channels i and i + R / 2 are turned together. columns: int64 ``[B, n]``, the tokens'.
    """
    shared = latents.transpose(1, 2).flatten(2).float()
    keys = torch.einsum("bnr,hrd->bhnd", shared, projection.float())
    size = rotary.shape[-1]
    wide = columns[None, :, :, None].expand(2, -1, -1, size)
    cos, sin = rotary.float().expand(-1, columns.shape[0], -1, -1).gather(2, wide).unsqueeze(2)
    turned, rest = keys[..., :size], keys[..., size:]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def read(
    fmt: KVFormat, buf: Tensor, start: int, end: int, filled: int, projection: Tensor, rotary: Tensor, columns: Tensor
) -> Tensor:
    """The keys in slots ``start .. end`` as ``[B, H, end - start, D]``: rebuilt, or exact where they are in the tail.

    columns: int64 ``[B, end - start]``. Other arguments as in ``rebuild`` and ``kv_format.read``.
    """
    parts, done = [], min(end, fmt.quantised(filled))
    if start < done:
        latents = kv_format.blocks(fmt, buf)[0].flatten(2, 3)[:, :, start:done]
        parts.append(rebuild(latents, projection, rotary, columns[:, : done - start]).to(DTYPES[fmt.dtype]))
    exact = kv_format.read(fmt, buf, max(start, done), max(end, done), filled)
    return torch.cat([*parts, exact[..., : fmt.head_dim]], 2)
