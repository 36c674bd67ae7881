"""The rotary embedding of every column of a sequence, for keys that are embedded when they are read."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

# Columns that a table grows by at least.
STEP = 256


class RotaryTable:
    """Cosine and sine of each column, float32 ``[2, B, C, R]``; one for all layers of a cache that turn alike.

    A column's embedding never changes, so sequences that were continued in different ways can share a table.
    """

    def __init__(self, buf: Tensor):
        self.buf = buf
        self._taken: tuple[weakref.ref[Tensor], RotaryTable] | None = None
        # One decode graph for every capacity: without the mark Dynamo compiles a static size first.
        torch._dynamo.maybe_mark_dynamic(buf, 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.buf.nbytes

    @property
    def host_bytes(self) -> int:
        """None of it is set aside."""
        return 0

    @property
    def file_bytes(self) -> int:
        """None of it is in files."""
        return 0

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns >= self.buf.shape[2]:
            self.buf = _with_room(self.buf, columns)
            torch._dynamo.maybe_mark_dynamic(self.buf, 2)

    def taken(self, rows: Tensor) -> RotaryTable:
        """The table of the batch rows ``rows`` int64 ``[B']``; asked for the same ones again, as every layer does, the
        same table."""
        if self._taken is None or self._taken[0]() is not rows:
            self._taken = weakref.ref(rows), RotaryTable(self.buf.index_select(1, rows))
        return self._taken[1]

    def to(self, device: torch.device) -> RotaryTable:
        """A copy on another device."""
        return RotaryTable(self.buf.to(device))


@torch.inference_mode(False)
@torch.no_grad()
def rotary_table(cos: Tensor, sin: Tensor, batch: int) -> RotaryTable:
    """The table of a prompt whose tokens are turned by cos and sin, ``[B | 1, .., S, R]``."""
    tokens, size = cos.shape[-2:]
    found = torch.stack([cos.reshape(-1, tokens, size), sin.reshape(-1, tokens, size)]).float()
    return RotaryTable(_with_room(found.expand(-1, batch, -1, -1), tokens))


@torch.inference_mode(False)
@torch.no_grad()
def _with_room(buf: Tensor, columns: int) -> Tensor:
    room = (columns + max(columns // 8, STEP)) // STEP * STEP + 1
    wider = buf.new_zeros(*buf.shape[:2], room, buf.shape[3])
    wider[:, :, : buf.shape[2]].copy_(buf)
    return wider
