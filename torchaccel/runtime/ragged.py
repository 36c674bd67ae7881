"""Storage for caches whose KV heads keep different numbers of tokens: each has pages of its own in one buffer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchaccel.kernels.ragged import PAGE
from torchaccel.kernels.spec import DTYPES

from .eviction import HeadWindows
from .layout import Layout
from .storage import MOST_SLACK, SLACK, Prefix, Storage


@dataclass(frozen=True)
class Segments:
    """Where each row and head has its tokens: in consecutive pages, oldest first.

    counts: int64 ``[B, H]`` on the CPU, tokens stored at column ``base``. room: columns behind it that have slots. A
    column from ``base`` on is stored by all heads, so its slots are known before its tokens come.
    """

    counts: Tensor
    base: int
    room: int

    @cached_property
    def pages(self) -> Tensor:
        """Pages of each row and head, int64 ``[B, H]``."""
        return (self.counts + (self.room + PAGE - 1)) // PAGE

    @cached_property
    def starts(self) -> Tensor:
        """First slot of each row and head, int64 ``[B, H]``."""
        return (self.pages.flatten().cumsum(0).view_as(self.pages) - self.pages) * PAGE

    @cached_property
    def slots(self) -> int:
        """Slots of all rows and heads together."""
        return int(self.pages.sum()) * PAGE

    @property
    def tails(self) -> Tensor:
        """Slot of column ``base`` in each row and head, int64 ``[B, H]``."""
        return self.starts + self.counts

    def table(self) -> Tensor:
        """The pages of each row and head, int32 ``[B, H, N]``, -1 for none; two at least, as 1 is no dynamic size."""
        number = torch.arange(max(int(self.pages.max()), 2))
        table = (self.starts // PAGE)[..., None] + number
        return table.masked_fill(number >= self.pages[..., None], -1).int()

    def columns(self) -> Tensor:
        """Column of every slot from ``base`` on, int32 ``[slots]``; of older tokens too small, to be filled in."""
        sizes = self.pages.flatten() * PAGE
        first = torch.repeat_interleave(self.tails.flatten(), sizes)
        return (self.base + torch.arange(self.slots) - first).int()


def places(starts: Tensor, counts: Tensor, sinks: int = 0, skipped: Tensor | None = None) -> Tensor:
    """Slots of ``counts`` tokens from ``starts`` on (both int64 ``[B, H]``) for one head after another, int64.

    skipped: int64 ``[B, H]``, how many slots are left out behind the first ``sinks``.
    """
    counts, starts = counts.flatten(), starts.flatten()
    head = torch.repeat_interleave(torch.arange(counts.shape[0]), counts)
    place = torch.arange(head.shape[0]) - (counts.cumsum(0) - counts)[head]
    if skipped is not None:
        place += torch.where(place >= sinks, skipped.flatten()[head], 0)
    return starts[head] + place


def slack(counts: Tensor) -> int:
    """Columns for which room is made at a time: see ``storage.SLACK``."""
    return min(max(int(counts.sum()) // max(counts.numel(), 1) // SLACK, PAGE), MOST_SLACK)


class RaggedStorage(Storage):
    """A buffer ``[1, 1, C, D]`` of pages. Slots are counted as columns of the sequence: ``filled`` is its length.

    Heads that see a window drop what has left it whenever the buffer is made anew, which is every ``Segments.room``
    columns; until then the kernel passes over it. Keys also have ``pages`` and ``tails``, see ``kernels.ragged``.
    """

    pages: Tensor | None = None
    tails: Tensor | None = None

    def __init__(self, layout: Layout, segments: Segments, device: torch.device, contiguous_from: int):
        """Slots without a token are zero. contiguous_from: the column from which on all heads keep everything."""
        fmt = layout.format
        # Slots to come are read with those before them, and weighted with zero: they must be finite.
        buf = torch.zeros(1, 1, segments.slots, fmt.head_dim, dtype=DTYPES[fmt.dtype], device=device)
        columns = segments.columns()[None, None].to(device) if layout.positions else None
        super().__init__(layout, buf, segments.base, columns, contiguous_from)
        self.segments = segments
        self.capacity = segments.base + segments.room
        if layout.positions:
            self.pages, self.tails = segments.table().to(device), segments.tails.to(device)
            torch._dynamo.maybe_mark_dynamic(self.pages, 2)

    @property
    def rows(self) -> int:
        return self.segments.counts.shape[0]

    @property
    def heads(self) -> int:
        return self.segments.counts.shape[1]

    @property
    def inner(self) -> dict[str, Tensor]:
        own = {"pages": self.pages, "tails": self.tails}
        return super().inner | {name: tensor for name, tensor in own.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(x.nbytes for x in (self.pages, self.tails) if x is not None)

    @property
    def windows(self) -> HeadWindows | None:
        """The heads that see a window."""
        policy = self.layout.eviction
        return None if policy is None else policy.windows

    def stored(self, start: int, end: int) -> int:
        return int(self.segments.counts.min()) + end - self.segments.base

    def lengths(self, start: int, end: int, logical: int) -> tuple[int, ...]:
        return 0, self.segments.slots, logical, end - self.segments.base

    def oversized(self, end: int) -> bool:
        """Whether so much was appended at once that heads with windows should drop what they passed by."""
        return self.windows is not None and end - self.segments.base > 2 * slack(self.segments.counts)

    def intact(self, end: int, age: int) -> bool:
        """Whether nobody alive reads what comes behind column ``end``: only then may it be overwritten."""
        return not any(view.end > end for view in self.views.values())

    def truncate(self, end: int) -> None:
        self.filled = end

    def read(self, start: int, end: int, age: int | None = None) -> Tensor:
        """Columns ``start .. end`` as ``[B, H, n, D]`` of a storage that holds them all."""
        slots = self.segments.starts[..., None] + torch.arange(start, end)
        return self.buf[0, 0][slots.to(self.buf.device)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(
        self, start: int, end: int, room: int, batch: Tensor | None = None, age: int | None = None
    ) -> tuple[RaggedStorage, int]:
        """A storage of its own for the columns before ``end``, without what no window will show again."""
        rows = torch.arange(self.rows) if batch is None else batch.cpu()
        stored = self.segments.counts[rows] + (end - self.segments.base)
        kept, sinks = stored, 0
        if self.windows is not None:
            kept, sinks = stored.minimum(self.windows.limits()), self.windows.sinks
        segments = Segments(kept, end, room + slack(kept))
        contiguous_from = self.contiguous_from
        if self.windows is not None and bool((kept < stored).any()):
            contiguous_from = max(contiguous_from, end - self.windows.REWIND)
        new = RaggedStorage(self.layout, segments, self.buf.device, contiguous_from)
        old = places(self.segments.starts[rows], kept, sinks, stored - kept).to(self.buf.device)
        to = places(segments.starts, kept).to(self.buf.device)
        new.buf[0, 0].index_copy_(0, to, self.buf[0, 0].index_select(0, old))
        if new.positions is not None and self.positions is not None:
            new.positions[0, 0].index_copy_(0, to, self.positions[0, 0].index_select(0, old))
        return new, 0

    def moved(self, device: torch.device, prefixes: tuple[Prefix, ...] = ()) -> Storage:
        new = RaggedStorage(self.layout, self.segments, device, self.contiguous_from)
        new.buf.copy_(self.buf)
        if new.positions is not None and self.positions is not None:
            new.positions.copy_(self.positions)
        new.filled = self.filled
        return new


@torch.inference_mode(False)
@torch.no_grad()
def store_ragged(
    layouts: tuple[Layout, Layout], keys: Tensor, values: Tensor, kept: Tensor, logical: int, columns: Tensor | None
) -> tuple[RaggedStorage, RaggedStorage]:
    """Storages for the tokens of keys, values ``[B, H, S, D]`` that ``kept`` bool ``[B, H, S]`` marks.

    logical: length of the sequence. columns: int64 ``[B, 1, S]``, where it was pruned before.
    """
    counts = kept.sum(-1).cpu()
    segments = Segments(counts, logical, slack(counts))
    policy, rewind = layouts[0].eviction, 0
    if policy is not None and policy.windows is not None and columns is None:
        rewind = min(policy.windows.REWIND, int(counts.min()))
    to = places(segments.starts, counts).to(keys.device)
    found = []
    for layout, tokens in zip(layouts, (keys, values), strict=True):
        storage = RaggedStorage(layout, segments, keys.device, logical - rewind)
        storage.buf[0, 0].index_copy_(0, to, tokens[kept].to(storage.buf.dtype))
        if storage.positions is not None:
            place = torch.arange(keys.shape[2], device=keys.device).view(1, 1, -1) if columns is None else columns
            storage.positions[0, 0].index_copy_(0, to, place.expand_as(kept)[kept].int())
        found.append(storage)
    return found[0], found[1]
