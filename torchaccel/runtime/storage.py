"""The physical memory behind logical KV tensors: capacity, ownership, growth."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat

# Capacity grows by a quarter, so a token is copied about four times over a whole generation (amortised O(1)) and the
# slack stays under 25 % of the live bytes; multiples of 64 keep whole quantisation blocks.
GROWTH = 1.25
ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """What a logical KV tensor stores physically; hashable, and guarded by the compiled graphs.

    ``positions`` says that only some tokens are stored and each slot carries its logical column.
    """

    format: KVFormat
    positions: bool = False


class Storage:
    """One buffer, the number of slots filled in it, and the views that still read it."""

    def __init__(self, layout: Layout, buf: Tensor, filled: int, positions: Tensor | None, contiguous_from: int):
        """Take ownership of ``buf`` (see ``KVFormat``) and, for pruned layouts, positions int32 ``[B, C]``.

        contiguous_from: logical column from which on every column has a slot (0 when nothing was pruned).
        """
        self.layout = layout
        self.buf = buf
        self.filled = filled
        self.positions = positions
        self.contiguous_from = contiguous_from
        self.views: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @property
    def capacity(self) -> int:
        """Slots that the buffer can hold."""
        return kv_format.capacity(self.layout.format, self.buf)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated."""
        own = self.buf.numel() * self.buf.element_size()
        return own + (0 if self.positions is None else self.positions.numel() * self.positions.element_size())

    def read(self, start: int, end: int) -> Tensor:
        """Slots ``start .. end`` as ``[B, H, n, D]`` in the model's dtype."""
        return kv_format.read(self.layout.format, self.buf, start, end, self.filled)

    def newest(self, view: object, end: int) -> bool:
        """Whether ``view``, which ends at slot ``end``, may append in place: nobody alive reads beyond it."""
        return self.filled == end or all(other is view or other.end <= end for other in self.views.values())

    def truncate(self, end: int) -> None:
        """Forget the slots from ``end`` on."""
        if end < self.filled:
            kv_format.truncate(self.layout.format, self.buf, self.filled, end)
            self.filled = end

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, start: int, end: int, room: int, batch: Tensor | None = None) -> tuple[Storage, int]:
        """A storage of its own for slots ``start .. end`` with room for ``room`` more; returns it and its start.

        batch: int64 ``[B']`` rows to take (beam search), or None for all.
        """
        fmt = self.layout.format
        # Whole quantised blocks are moved as they are: their codes must not be made anew.
        base = start - start % fmt.block if fmt.kind == "int8" else start
        pick = (lambda t: t) if batch is None else (lambda t: t.index_select(0, batch))
        rows, heads = (self.buf.shape[0] if batch is None else batch.shape[0]), self.buf.shape[1]
        buf = kv_format.allocate(fmt, rows, heads, grown(end - base + room), self.buf.device)
        new = Storage(self.layout, buf, end - base, None, self.contiguous_from)
        if fmt.kind == "dense":
            buf[:, :, : end - base].copy_(pick(self.buf[:, :, base:end]))
        elif fmt.kind == "int8":
            done = end // fmt.block * fmt.block
            size = (done - base) // fmt.block * fmt.block_bytes
            lo = fmt.tail_bytes + base // fmt.block * fmt.block_bytes
            buf[..., fmt.tail_bytes : fmt.tail_bytes + size].copy_(pick(self.buf[..., lo : lo + size]))
            kv_format.tail(fmt, buf)[:, :, : end - done].copy_(pick(self.read(done, end)))
        if self.positions is not None:
            new.positions = self.positions.new_empty(rows, new.capacity)
            new.positions[:, : end - base].copy_(pick(self.positions[:, base:end]))
        return new, start - base


def grown(need: int) -> int:
    """Capacity to allocate for ``need`` slots; strictly larger, so length never meets capacity."""
    return -(-int(need * GROWTH + 1) // ALIGNMENT) * ALIGNMENT


@torch.inference_mode(False)
@torch.no_grad()
def store(layout: Layout, tokens: Tensor, logical: int, positions: Tensor | None = None) -> Storage:
    """Compress ``tokens`` ``[B, H, n, D]`` into a new storage; ``positions`` int32 ``[B, n]`` when some were pruned."""
    batch, heads, n, _ = tokens.shape
    buf = kv_format.allocate(layout.format, batch, heads, grown(n), tokens.device)
    kv_format.append(layout.format, buf, 0, tokens)
    slots = None
    if layout.positions:
        room = kv_format.capacity(layout.format, buf)
        slots = torch.empty(batch, room, dtype=torch.int32, device=tokens.device)
        columns = torch.arange(n, device=tokens.device) if positions is None else positions
        slots[:, :n] = columns.to(torch.int32)
    return Storage(layout, buf, n, slots, logical if layout.positions else 0)
