"""Reference storage of a KV format: allocate, append, read, truncate, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import codebook, low_rank
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
    if fmt.is_blocked:
        return (buf.shape[2] - fmt.tail_bytes) // fmt.block_bytes * fmt.block
    return buf.shape[2]


def tail(fmt: KVFormat, buf: Tensor) -> Tensor:
    """The full-precision tail of a buffer with blocks as a view ``[B, H, window + block, width]``."""
    view = buf[..., : fmt.tail_bytes].view(DTYPES[fmt.dtype])
    return view.unflatten(-1, (fmt.tail_tokens, fmt.width))


def blocks(fmt: KVFormat, buf: Tensor) -> tuple[Tensor, ...]:
    """What the N blocks of ``buf`` store, as views ``[B, H, N, *sizes]``, one for each of ``fmt.parts``.

    The first three of a format with a uniform codebook are packed codes, scales and minima.
    """
    body = buf[..., fmt.tail_bytes :].unflatten(-1, (-1, fmt.block_bytes))
    found, at = [], 0
    for part in fmt.parts:
        view = body[..., at : at + part.nbytes].view(part.dtype)
        found.append(view if len(part.sizes) == 1 else view.unflatten(-1, part.sizes))
        at += part.nbytes
    return tuple(found)


def pack(fmt: KVFormat, codes: Tensor) -> Tensor:
    """Codes ``[..., block, D]`` (uint8) as the bytes ``[..., code_bytes]`` that a block stores."""
    if fmt.packing == "channel":
        codes = codes.transpose(-1, -2)
    each = 8 // fmt.bits
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % (4 * each)))
    # [quads / each, each, 4, M] -> [quads / each, M, 4, each]
    parts = codes.unflatten(-2, (-1, each, 4)).movedim(-1, -3).movedim(-2, -1)
    shifts = torch.arange(each, device=codes.device, dtype=torch.uint8) * fmt.bits
    return (parts << shifts).sum(-1, dtype=torch.uint8).flatten(-3)


def unpack(fmt: KVFormat, packed: Tensor) -> Tensor:
    """The codes ``[..., block, D]`` (uint8) of which ``pack`` made ``packed``."""
    channels = fmt.packing == "channel"
    size, other = (fmt.head_dim, fmt.block) if channels else (fmt.block, fmt.head_dim)
    shifts = torch.arange(8 // fmt.bits, device=packed.device, dtype=torch.uint8) * fmt.bits
    parts = (packed.unflatten(-1, (-1, other, 4, 1)) >> shifts) & (2**fmt.bits - 1)
    codes = parts.movedim(-1, -2).movedim(-3, -1).flatten(-4, -2)[..., :size, :]
    return codes.transpose(-1, -2) if channels else codes


def quantise(fmt: KVFormat, x: Tensor) -> tuple[Tensor, ...]:
    """Quantise blocks ``[..., block, D]``: uint8 codes of that shape, and the other ``fmt.parts`` ``[..., *sizes]``.

    The error is at most half a scale per value (plus the float16 rounding of the minimum); a constant group is exact up
    to that rounding. Corrections reduce it, see ``KVFormat``.
    """
    x, dim = _grouped(fmt, x.float()), _group_dim(fmt)
    if fmt.codebook == "gaussian":
        codes, scale = codebook.encode(fmt, x)
        return _ungrouped(fmt, codes), scale.squeeze(dim).flatten(-2)
    places = _extremes(fmt, x)
    filled = x
    if places is not None:
        filled = x.scatter(dim, places, x.double().mean(dim, keepdim=True).float().expand_as(places))
    low, high = filled.amin(dim), filled.amax(dim)
    minimum = low.half()
    steps = 2**fmt.bits - 1
    # The scale is rounded up so that the largest value still has a code after the float16 rounding.
    scale = ((high - minimum.float()).clamp(min=0) / steps * (1 + 2**-10)).half()
    step = scale.float()
    step = torch.where(step > 0, step, torch.ones_like(step)).unsqueeze(dim)
    codes = ((filled - minimum.float().unsqueeze(dim)) / step).round().clamp(0, steps).to(torch.uint8)
    found = [_ungrouped(fmt, codes), scale.flatten(-2), minimum.flatten(-2)]
    if not fmt.is_corrected:
        return tuple(found)
    # float64, so that implementations agree bit for bit although they sum in different orders.
    left = x.double() - codes.double() * scale.double().unsqueeze(dim) - minimum.double().unsqueeze(dim)
    if fmt.rank:
        elsewhere = left if places is None else left.scatter(dim, places, 0.0)
        a, b = (t.half() for t in low_rank.factors(_ungrouped(fmt, elsewhere), fmt.rank))
        found += [a, b]
        left = left - _grouped(fmt, a.double().mT @ b.double())
    if places is not None:
        found += [_stacked(fmt, left.gather(dim, places).half()), _stacked(fmt, places.to(torch.uint8))]
    return tuple(found)


def dequantise(fmt: KVFormat, codes: Tensor, *parts: Tensor) -> Tensor:
    """The values, in ``fmt.dtype`` and the shape of ``codes``, of which ``quantise`` made ``codes`` and ``parts``."""
    stored = dict(zip((part.name for part in fmt.parts[1:]), parts, strict=True))
    dim, others = _group_dim(fmt), fmt.head_dim if fmt.axis == "channel" else fmt.block
    scale = stored["scales"].float().unflatten(-1, (-1, others)).unsqueeze(dim)
    if fmt.codebook == "gaussian":
        return _ungrouped(fmt, codebook.decode(fmt, _grouped(fmt, codes), scale)).to(DTYPES[fmt.dtype])
    x = _grouped(fmt, codes.float()) * scale + stored["minima"].float().unflatten(-1, (-1, others)).unsqueeze(dim)
    if fmt.rank:
        x = x + _grouped(fmt, stored["token_factors"].float().mT @ stored["channel_factors"].float())
    if fmt.outliers:
        values, places = (
            t.unflatten(-1, (-1, others)).movedim(-3, dim) for t in (stored["outliers"], stored["places"])
        )
        x = x.scatter_add(dim, places.long(), values.float())
    return _ungrouped(fmt, x).to(DTYPES[fmt.dtype])


def _extremes(fmt: KVFormat, x: Tensor) -> Tensor | None:
    """Where in its group each outlier of ``x`` (grouped) is: the smallest, then the largest, the last one last."""
    if not fmt.outliers:
        return None
    dim = _group_dim(fmt)
    order, half = x.sort(dim=dim, stable=True).indices, fmt.outliers // 2
    return torch.cat([order.narrow(dim, 0, half), order.narrow(dim, fmt.group_size - half, half)], dim)


def _stacked(fmt: KVFormat, x: Tensor) -> Tensor:
    """What stands at places of groups as it is stored, ``[..., outliers, groups]``."""
    return x.movedim(_group_dim(fmt), -3).flatten(-2)


def _group_dim(fmt: KVFormat) -> int:
    """The dimension of ``_grouped`` blocks in which the values of a group lie."""
    return -2 if fmt.axis == "channel" else -1


def _grouped(fmt: KVFormat, x: Tensor) -> Tensor:
    """Blocks ``[..., block, D]`` as ``[..., n, group, D]`` (groups of tokens) or ``[..., n, block, group]``."""
    if fmt.axis == "channel":
        return x.unflatten(-2, (-1, fmt.group_size))
    return x.unflatten(-1, (-1, fmt.group_size)).transpose(-2, -3)


def _ungrouped(fmt: KVFormat, x: Tensor) -> Tensor:
    return x.flatten(-3, -2) if fmt.axis == "channel" else x.transpose(-2, -3).flatten(-2)


def append(fmt: KVFormat, buf: Tensor, filled: int, new: Tensor) -> None:
    """Write ``new`` ``[B, H, n, width]`` into slots ``filled ..`` of ``buf``, and encode complete blocks."""
    if fmt.kind == "empty":
        return
    n = new.shape[2]
    if fmt.kind == "dense":
        buf[:, :, filled : filled + n].copy_(new)
        return
    done, after = fmt.quantised(filled), fmt.quantised(filled + n)
    pending = torch.cat([tail(fmt, buf)[:, :, : filled - done], new.to(DTYPES[fmt.dtype])], 2)
    if after > done:
        parts = _encoded(fmt, pending[:, :, : after - done].unflatten(2, (-1, fmt.block)))
        for target, value in zip(blocks(fmt, buf), parts, strict=True):
            target[:, :, done // fmt.block : after // fmt.block].copy_(value)
    left = pending[:, :, after - done :]
    tail(fmt, buf)[:, :, : left.shape[2]].copy_(left)


def _encoded(fmt: KVFormat, x: Tensor) -> tuple[Tensor, ...]:
    """Blocks ``[..., block, width]`` as ``fmt.parts`` store them."""
    if fmt.kind == "latent":
        return (x[..., fmt.head_dim :],)
    codes, *parts = quantise(fmt, x)
    return (pack(fmt, codes), *parts)


def read(fmt: KVFormat, buf: Tensor, start: int, end: int, filled: int) -> Tensor:
    """Slots ``start .. end`` as ``[B, H, end - start, width]`` in ``fmt.dtype``; ``filled`` is what the buffer holds.

    Raises ``ValueError`` for latent tokens in blocks, which ``latents.read`` rebuilds, and for the empty format.
    """
    if fmt.kind == "dense":
        return buf[:, :, start:end]
    if fmt.kind == "empty":
        raise ValueError("an empty KV format holds no tokens to read")
    done = fmt.quantised(filled)
    parts = []
    if start < min(end, done):
        if fmt.kind == "latent":
            raise ValueError(
                f"of slots {start} to {min(end, done)} only latents are stored; latents.read rebuilds their keys"
            )
        lo, hi = start // fmt.block, -(-min(end, done) // fmt.block)
        codes, *stored = (t[:, :, lo:hi] for t in blocks(fmt, buf))
        flat = dequantise(fmt, unpack(fmt, codes), *stored).flatten(2, 3)
        parts.append(flat[:, :, start - lo * fmt.block : min(end, done) - lo * fmt.block])
    if end > done:
        parts.append(tail(fmt, buf)[:, :, max(start, done) - done : end - done])
    return torch.cat(parts, 2) if parts else tail(fmt, buf)[:, :, :0]


def truncate(fmt: KVFormat, buf: Tensor, filled: int, length: int, tokens: Tensor | None = None) -> None:
    """Make ``length`` the number of filled slots: tokens of opened blocks go back into the tail.

    tokens: ``[B, H, n, width]``, the last n before ``length``, where they cannot be read (latent keys).
    """
    first = fmt.quantised(length)
    if fmt.is_blocked and first < fmt.quantised(filled):
        tokens = read(fmt, buf, first, length, filled) if tokens is None else tokens
        tail(fmt, buf)[:, :, : length - first].copy_(tokens[:, :, tokens.shape[2] - (length - first) :])
