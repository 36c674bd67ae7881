"""Reference storage of a KV format: allocate, append, read, truncate, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import DTYPES, KVFormat


def allocate(fmt: KVFormat, batch: int, heads: int, capacity: int, device: torch.device) -> Tensor:
    """An uninitialised buffer for ``capacity`` tokens (rounded up to whole blocks for block formats)."""
    if fmt.kind == "empty":
        return torch.empty(batch, heads, 0, fmt.head_dim, dtype=DTYPES[fmt.dtype], device=device)
    if fmt.kind == "dense":
        return torch.empty(batch, heads, capacity, fmt.head_dim, dtype=DTYPES[fmt.dtype], device=device)
    blocks = -(-capacity // fmt.block)
    return torch.empty(batch, heads, fmt.tail_bytes + blocks * fmt.block_bytes, dtype=torch.uint8, device=device)


def capacity(fmt: KVFormat, buf: Tensor) -> int:
    """Number of token slots of ``buf``."""
    if fmt.kind == "int8":
        return (buf.shape[2] - fmt.tail_bytes) // fmt.block_bytes * fmt.block
    return buf.shape[2]


def tail(fmt: KVFormat, buf: Tensor) -> Tensor:
    """The full-precision tail of an int8 buffer as a view ``[B, H, block, D]``."""
    view = buf[..., : fmt.tail_bytes].view(DTYPES[fmt.dtype])
    return view.unflatten(-1, (fmt.block, fmt.head_dim))


def blocks(fmt: KVFormat, buf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[B, H, N, block, D]`` (uint8), scales and minima ``[B, H, N, groups]`` (float16) as views of ``buf``."""
    body = buf[..., fmt.tail_bytes :].unflatten(-1, (-1, fmt.block_bytes))
    size = fmt.block * fmt.head_dim
    codes = body[..., :size].unflatten(-1, (fmt.block, fmt.head_dim))
    scales = body[..., size : size + 2 * fmt.groups].view(torch.float16)
    minima = body[..., size + 2 * fmt.groups :].view(torch.float16)
    return codes, scales, minima


def quantise(fmt: KVFormat, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise blocks ``[..., block, D]``: uint8 codes of that shape, float16 scales and minima ``[..., groups]``.

    The error is at most half a scale per value (plus the float16 rounding of the minimum); a constant group is exact up
    to that rounding.
    """
    x = x.float()
    dim = -2 if fmt.axis == "channel" else -1
    low, high = x.amin(dim), x.amax(dim)
    minimum = low.half()
    # The scale is rounded up so that the largest value still has a code after the float16 rounding.
    scale = ((high - minimum.float()).clamp(min=0) / 255 * (1 + 2**-10)).half()
    step = scale.float()
    step = torch.where(step > 0, step, torch.ones_like(step)).unsqueeze(dim)
    codes = ((x - minimum.float().unsqueeze(dim)) / step).round().clamp(0, 255)
    return codes.to(torch.uint8), scale, minimum


def dequantise(fmt: KVFormat, codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """``code * scale + minimum`` in ``fmt.dtype``, shape of ``codes``."""
    dim = -2 if fmt.axis == "channel" else -1
    x = codes.float() * scales.float().unsqueeze(dim) + minima.float().unsqueeze(dim)
    return x.to(DTYPES[fmt.dtype])


def append(fmt: KVFormat, buf: Tensor, filled: int, new: Tensor) -> None:
    """Write ``new`` ``[B, H, n, D]`` into slots ``filled ..`` of ``buf``; blocks that become complete are quantised."""
    if fmt.kind == "empty":
        return
    n = new.shape[2]
    if fmt.kind == "dense":
        buf[:, :, filled : filled + n].copy_(new)
        return
    rest = filled % fmt.block
    pending = torch.cat([tail(fmt, buf)[:, :, :rest], new.to(DTYPES[fmt.dtype])], 2)
    whole = pending.shape[2] // fmt.block
    if whole:
        first = filled // fmt.block
        codes, scales, minima = blocks(fmt, buf)
        got = quantise(fmt, pending[:, :, : whole * fmt.block].unflatten(2, (whole, fmt.block)))
        for target, value in zip((codes, scales, minima), got, strict=True):
            target[:, :, first : first + whole].copy_(value)
    left = pending[:, :, whole * fmt.block :]
    tail(fmt, buf)[:, :, : left.shape[2]].copy_(left)


def read(fmt: KVFormat, buf: Tensor, start: int, end: int, filled: int) -> Tensor:
    """Slots ``start .. end`` as ``[B, H, end - start, D]`` in ``fmt.dtype``; ``filled`` is what the buffer holds."""
    if fmt.kind == "dense":
        return buf[:, :, start:end]
    if fmt.kind == "empty":
        raise ValueError("an empty KV format holds no tokens to read")
    done = filled - filled % fmt.block
    parts = []
    if start < done:
        lo, hi = start // fmt.block, -(-min(end, done) // fmt.block)
        codes, scales, minima = (t[:, :, lo:hi] for t in blocks(fmt, buf))
        flat = dequantise(fmt, codes, scales, minima).flatten(2, 3)
        parts.append(flat[:, :, start - lo * fmt.block : min(end, done) - lo * fmt.block])
    if end > done:
        parts.append(tail(fmt, buf)[:, :, max(start, done) - done : end - done])
    return torch.cat(parts, 2) if parts else tail(fmt, buf)[:, :, :0]


def truncate(fmt: KVFormat, buf: Tensor, filled: int, length: int) -> None:
    """Make ``length`` the number of filled slots: an opened block goes back into the tail."""
    if fmt.kind == "int8" and length // fmt.block < filled // fmt.block and length % fmt.block:
        first = length - length % fmt.block
        tail(fmt, buf)[:, :, : length - first].copy_(read(fmt, buf, first, length, filled))
