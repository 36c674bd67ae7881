"""Storages of tokens that wait to be sorted into classes."""

from __future__ import annotations

import torch
from torch import Tensor

from torchaccel.kernels import kv_format

from .layout import Layout
from .storage import Storage, grown, store


@torch.inference_mode(False)
@torch.no_grad()
def waiting(
    layout: Layout,
    tokens: Tensor,
    first: int,
    classes: tuple[Storage, ...],
    scale: Tensor | None = None,
    room: int = 0,
) -> Storage:
    """A mixed storage of ``tokens`` ``[B, H, n, D]`` of columns ``first ..`` that wait to be sorted into ``classes``.

    scale: what the tokens were divided by. room: for so many tokens more.
    """
    batch, heads, n, _ = tokens.shape
    buf = kv_format.allocate(layout.format, batch, heads, grown(n + room), tokens.device)
    buf[:, :, :n] = tokens
    slots = None
    if layout.positions:
        slots = torch.empty(batch, 1, buf.shape[2], dtype=torch.int32, device=tokens.device)
        slots[..., :n] = torch.arange(first, first + n, device=tokens.device)
    return Storage(layout, buf, n, slots, first, classes=classes, scale=scale)


def unsorted(storage: Storage, tokens: Tensor) -> Storage:
    """A mixed storage like ``storage`` of other tokens ``[B, H, n, D]``, all of which wait to be sorted."""
    divided = tokens if storage.scale is None else tokens / storage.scale
    none = torch.empty(*divided.shape[:2], 0, dtype=torch.int64, device=divided.device)
    empty = tuple(store(part.layout, divided[:, :, :0], 0, none) for part in storage.classes)
    return waiting(storage.layout, divided, 0, empty, storage.scale)
