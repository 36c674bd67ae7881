"""The physical memory behind logical KV tensors: capacity, ownership, growth."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchaccel.kernels import kv_format, registry
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


@dataclass(frozen=True)
class Cut:
    """Tokens ``[B, H, n, D]`` that stood in slots ``first ..`` before they were given up for others."""

    first: int
    tokens: Tensor


class Storage:
    """One buffer, the number of slots filled in it, and what its older readers still need.

    Appending behind an older, shorter view overwrites slots. When somebody alive still reads those, their tokens are
    kept in ``cuts`` (assisted generation gives up a few tokens a round: that costs those tokens, not a copy of all).
    """

    def __init__(self, layout: Layout, buf: Tensor, filled: int, positions: Tensor | None, contiguous_from: int):
        """Take ownership of ``buf`` (see ``KVFormat``) and, for pruned layouts, positions int32 ``[B, C]``.

        contiguous_from: logical column from which on every column has a slot (0 when nothing was pruned).
        """
        self.layout = layout
        self.buf = buf
        self.filled = filled
        self.positions = positions
        self.contiguous_from = contiguous_from
        self.capacity = kv_format.capacity(layout.format, buf)
        self.nbytes = buf.nbytes + (0 if positions is None else positions.nbytes)
        self.views: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.cuts: list[Cut] = []
        # One decode graph for every capacity: without the marks Dynamo compiles a static size first.
        torch._dynamo.maybe_mark_dynamic(buf, 2)
        if positions is not None:
            torch._dynamo.maybe_mark_dynamic(positions, 1)

    def intact(self, end: int, age: int) -> bool:
        """Whether nothing before slot ``end`` was overwritten since cut number ``age``."""
        return all(cut.first >= end for cut in self.cuts[age:])

    def read(self, start: int, end: int, age: int | None = None) -> Tensor:
        """Slots ``start .. end`` as ``[B, H, n, D]`` in the model's dtype, as they were at cut number ``age``."""
        age = len(self.cuts) if age is None else age
        if self.intact(end, age):
            return kv_format.read(self.layout.format, self.buf, start, end, self.filled)
        present = kv_format.read(self.layout.format, self.buf, start, min(end, self.filled), self.filled)
        tokens = present.new_empty(*present.shape[:2], end - start, present.shape[3])
        tokens[:, :, : present.shape[2]].copy_(present)
        for cut in reversed(self.cuts[age:]):
            low, high = max(cut.first, start), min(cut.first + cut.tokens.shape[2], end)
            if low < high:
                tokens[:, :, low - start : high - start].copy_(cut.tokens[:, :, low - cut.first : high - cut.first])
        return tokens

    def truncate(self, end: int) -> None:
        """Give up the slots from ``end`` on, keeping their tokens for whoever alive still reads them."""
        if end >= self.filled:
            return
        fmt = self.layout.format
        if any(view.end > end for view in self.views.values()):
            self.cuts.append(Cut(end, kv_format.read(fmt, self.buf, end, self.filled, self.filled).clone()))
        kv_format.truncate(fmt, self.buf, self.filled, end)
        self.filled = end

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(
        self, start: int, end: int, room: int, batch: Tensor | None = None, age: int | None = None
    ) -> tuple[Storage, int]:
        """A storage of its own for slots ``start .. end`` with room for ``room`` more; returns it and its start.

        batch: int64 ``[B']`` rows to take (beam search), or None for all. age: see ``read``.
        """
        fmt = self.layout.format
        pick = (lambda t: t) if batch is None else (lambda t: t.index_select(0, batch))
        rows, heads = (self.buf.shape[0] if batch is None else batch.shape[0]), self.buf.shape[1]
        # Whole quantised blocks are moved as they are: their codes must not be made anew.
        intact = self.intact(end, len(self.cuts) if age is None else age)
        base = start - start % fmt.block if fmt.is_blocked and intact else start
        buf = kv_format.allocate(fmt, rows, heads, grown(end - base + room), self.buf.device)
        slots = None
        if self.positions is not None:
            slots = self.positions.new_empty(rows, kv_format.capacity(fmt, buf))
            slots[:, : end - base].copy_(pick(self.positions[:, base:end]))
        if fmt.is_blocked and intact:
            done = max(base, fmt.quantised(end))
            size = (done - base) // fmt.block * fmt.block_bytes
            lo = fmt.tail_bytes + base // fmt.block * fmt.block_bytes
            buf[..., fmt.tail_bytes : fmt.tail_bytes + size].copy_(pick(self.buf[..., lo : lo + size]))
            kv_format.tail(fmt, buf)[:, :, : end - done].copy_(pick(self.read(done, end)))
        elif fmt.kind != "empty":
            kv_format.append(fmt, buf, 0, pick(self.read(base, end, age)))
        return Storage(self.layout, buf, end - base, slots, self.contiguous_from), start - base


def grown(need: int) -> int:
    """Capacity to allocate for ``need`` slots; strictly larger, so length never meets capacity."""
    return -(-int(need * GROWTH + 1) // ALIGNMENT) * ALIGNMENT


@torch.inference_mode(False)
@torch.no_grad()
def store(layout: Layout, tokens: Tensor, logical: int, positions: Tensor | None = None) -> Storage:
    """Compress ``tokens`` ``[B, H, n, D]`` into a new storage; ``positions`` int32 ``[B, n]`` when some were pruned."""
    batch, heads, n, _ = tokens.shape
    buf = kv_format.allocate(layout.format, batch, heads, grown(n), tokens.device)
    # Quantising 32k tokens of 4 heads takes 6 ms here, and 92-180 ms operator by operator.
    registry.append(layout.format, buf.device.type).run(buf, 0, tokens)
    slots = None
    if layout.positions:
        room = kv_format.capacity(layout.format, buf)
        slots = torch.empty(batch, room, dtype=torch.int32, device=tokens.device)
        columns = torch.arange(n, device=tokens.device) if positions is None else positions
        slots[:, :n] = columns.to(torch.int32)
    return Storage(layout, buf, n, slots, logical if layout.positions else 0)
