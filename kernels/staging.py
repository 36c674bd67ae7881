"""Attention of a device to a cache in host memory: what a step lists is gathered there, sent over, and attended to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .spec import AttentionSpec, KVFormat

# Column of a slot that holds nothing: behind every query.
HIDDEN = 1 << 30


def refused(fmt: KVFormat) -> str | None:
    """Why tokens of a format cannot lie in host memory, in one line; None when they can."""
    return None if fmt.kind == "dense" else f"lists of {fmt.kind} tokens are not gathered in host memory"


def is_away(q: Tensor, buf: Tensor) -> bool:
    """Whether a cache lies in another memory than that of the device that attends to it."""
    return q.device != buf.device


def staged_spec(spec: AttentionSpec) -> AttentionSpec:
    """Of attention to what ``spec`` lists, once that lies side by side: its columns are stored, and hide the rest."""
    return replace(spec, index="contiguous", index_block=64, positions=True, causal=True)


def listed_slots(spec: AttentionSpec, index: Tensor, start: int, filled: int) -> Tensor:
    """The slots that a list names, int64 ``[B, H_kv, M]``; -1 for no entry and for what is not in ``start .. filled``.

    index: int32 ``[B, H_kv, N]``, see ``reference.listed``; M is N blocks of slots, or N.
    """
    size = spec.index_block if spec.index == "blocks" else 1
    slots = index.long()[..., None] * size + torch.arange(size, device=index.device)
    nothing = (index < 0)[..., None] | (slots < start) | (slots >= filled)
    return slots.masked_fill(nothing, -1).flatten(2)


def gathered(buf: Tensor, slots: Tensor, pinned: bool = False) -> Tensor:
    """The tokens ``[B, H, M, D]`` of ``buf`` ``[B, H, C, D]``, contiguous, in ``slots`` int64 ``[B, H, M]``; those of
    slot 0 where that is -1. pinned: into memory from which a GPU copies at its full rate, while others work."""
    batch, heads, capacity, dim = buf.shape
    row = torch.arange(batch * heads).view(batch, heads, 1) * capacity
    found = torch.empty(*slots.shape, dim, dtype=buf.dtype, pin_memory=pinned)
    torch.index_select(buf.view(-1, dim), 0, (slots.clamp(min=0) + row).flatten(), out=found.view(-1, dim))
    return found


def attend(
    run: Callable[..., Tensor],
    spec: AttentionSpec,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    index: Tensor,
) -> Tensor:
    """``reference.decode_attention`` of ``spec``, which lists what it reads, with its buffers in host memory.

    run: a kernel of ``staged_spec(spec)`` on the device of q, k_new, v_new, mask, positions and index. The values are
    gathered while the keys are on their way. Not run on a GPU yet.
    """
    start, filled, logical = lens.tolist()
    slots = listed_slots(spec, index, start, filled)
    # This waits for the device, and so for the tokens of earlier steps, which it sent to the buffers.
    here, n = slots.to(k_buf.device), q.shape[2]
    keys, values = _sent(k_buf, here, q.device), _sent(v_buf, here, q.device)
    if q.is_cuda:
        torch.cuda.current_stream(q.device).wait_stream(_side_stream(q.device))
    columns = slots - start if positions is None else _columns(positions, slots)
    fresh = torch.arange(logical, logical + n, device=q.device).expand(*columns.shape[:2], n)
    columns = torch.cat([columns.masked_fill(slots < 0, HIDDEN), fresh], 2).int()
    _append(((k_buf, k_new), (v_buf, v_new)), positions, filled, logical)
    keys, values = (torch.cat([x, new.to(x.dtype)], 2) for x, new in ((keys, k_new), (values, v_new)))
    whole = torch.tensor([0, columns.shape[2], logical])
    return run(q, None, None, keys, values, whole, mask, columns)


def attend_whole(
    run: Callable[..., Tensor], q: Tensor, k_new: Tensor, v_new: Tensor, k_buf: Tensor, v_buf: Tensor, lens: Tensor,
    *rest: Any,
) -> Tensor:  # fmt: skip
    """A kernel with its buffers in host memory: they are sent over whole, and the tokens it appends are sent back.

    For prompts in several parts, and where a list would name everything.
    """
    keys, values = (torch.empty_like(x, device=q.device).copy_(x, non_blocking=True) for x in (k_buf, v_buf))
    out = run(q, k_new, v_new, keys, values, lens, *rest)
    filled, n = int(lens[1]), q.shape[2]
    for buf, sent in ((k_buf, keys), (v_buf, values)):
        buf[:, :, filled : filled + n].copy_(sent[:, :, filled : filled + n])
    return out


def _append(pairs: tuple[tuple[Tensor, Tensor], ...], positions: Tensor | None, filled: int, logical: int) -> None:
    for buf, new in pairs:
        n = new.shape[2]
        buf[:, :, filled : filled + n].copy_(new, non_blocking=True)
        if positions is not None:
            positions[..., filled : filled + n] = torch.arange(logical, logical + n, device=positions.device)


def _columns(positions: Tensor, slots: Tensor) -> Tensor:
    return positions.expand(*slots.shape[:2], -1).gather(2, slots.clamp(min=0)).long()


def _sent(buf: Tensor, slots: Tensor, device: torch.device) -> Tensor:
    """What ``gathered`` finds, on its way to a device; a GPU has to wait for its side stream."""
    cuda = device.type == "cuda"
    found = gathered(buf, slots, pinned=cuda)
    with torch.cuda.stream(_side_stream(device)) if cuda else nullcontext():
        sent = found.to(device, non_blocking=True)
    if cuda:
        sent.record_stream(torch.cuda.current_stream(device))
    return sent


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device is sent what it asks for, next to what it computes."""
    return torch.cuda.Stream(device)
