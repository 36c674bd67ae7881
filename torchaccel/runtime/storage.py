"""The physical memory behind logical KV tensors: capacity, ownership, growth."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from torchaccel.errors import OffloadError
from torchaccel.kernels import kv_format, latents, registry, rotation
from torchaccel.kernels.spec import DTYPES, KVFormat

from . import huge_pages, offload
from .eviction import EvictionRecord, State
from .layout import Layout
from .rotary_table import RotaryTable
from .selection import Sizes, copied

# Room for a sixteenth more, at least 64 and at most 1024 tokens: every step reads the whole cache, so copying it once
# in that many steps costs a few per cent of a step at most, and hardly any memory lies idle. Multiples of 64 keep whole
# quantisation blocks.
SLACK = 16
ALIGNMENT = 64
MOST_SLACK = 1024


@dataclass(frozen=True)
class Cut:
    """Tokens ``[B, H, n, width]`` that stood in slots ``first ..`` before they were given up for others."""

    first: int
    tokens: Tensor


@dataclass(frozen=True)
class Prefix:
    """The first ``tokens`` slots of a storage, shared by rows of another: row b of B reads row b // (B / entries)."""

    storage: Storage
    tokens: int

    @property
    def entries(self) -> int:
        """Number of different prefixes: rows of the storage."""
        return self.storage.rows


class Storage:
    """One buffer, the number of slots filled in it, and what its older readers still need.

    Appending behind an older, shorter view overwrites slots. When somebody alive still reads those, their tokens are
    kept in ``cuts`` (assisted generation gives up a few tokens a round: that costs those tokens, not a copy of all).
    Slots count the own buffer; the tokens of ``prefixes`` come before its first one, and are nobody's to write.
    """

    def __init__(
        self,
        layout: Layout,
        buf: Tensor,
        filled: int,
        positions: Tensor | None,
        contiguous_from: int,
        prefixes: tuple[Prefix, ...] = (),
        table: RotaryTable | None = None,
        classes: tuple[Storage, ...] = (),
        scale: Tensor | None = None,
    ):
        """Take ownership of ``buf`` (see ``KVFormat``) and, for pruned layouts, positions int32 ``[B, 1 | H, C]``.

        contiguous_from: logical column from which on every column has a slot (0 when nothing was pruned). prefixes:
        what the rows share, that of most rows first; their number replaces the layout's. table: for layouts that are
        ``turned``. classes, scale: for layouts that are mixed, the other tokens, whose columns are stored with them,
        and of values what all were divided by ``[B, H, 1, D]``.
        """
        self.layout = replace(layout, prefixes=len(prefixes))
        self.buf = buf
        self.filled = filled
        self.positions = positions
        self.table = table
        self.classes = classes
        self.scale = scale
        self.contiguous_from = contiguous_from
        self.capacity = kv_format.capacity(layout.format, buf)
        self.record: EvictionRecord | None = None
        # Of the file that the buffer lies in.
        self.mapping: mmap | None = None
        # Of the layout's selection, in the order of its names.
        self.state: State = {}
        self.generation = 0
        self.views: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.cuts: list[Cut] = []
        self.prefixes = prefixes
        self.offset = sum(prefix.tokens for prefix in prefixes)
        self.readers: weakref.WeakSet[Storage] = weakref.WeakSet()
        for prefix in prefixes:
            prefix.storage.readers.add(self)
        # Why rows that begin alike have copies of their own here; None where there was nothing to share.
        self.unshared: str | None = None
        # One decode graph for every capacity: without the marks Dynamo compiles a static size first.
        torch._dynamo.maybe_mark_dynamic(buf, 2)
        if positions is not None:
            torch._dynamo.maybe_mark_dynamic(positions, 2)

    @property
    def device(self) -> torch.device:
        """The device that attends to the tokens."""
        return self.buf.device if self.layout.home is None else torch.device(self.layout.home)

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.buf.shape[0]

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that hold the tokens, and what is set aside."""
        aside = None if self.record is None else self.record.aside
        return (0 if self.mapping is None else self.buf.nbytes) + (aside.nbytes if aside and aside.mappings else 0)

    @property
    def sizes(self) -> Sizes:
        """What the shapes of a selection's state depend on."""
        return sizes(self.layout.format, self.buf)

    @property
    def heads(self) -> int:
        """Number of KV heads."""
        return self.buf.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this device: tokens unless they lie elsewhere, columns, what policies remember."""
        remembered = [*self.state.values(), *(self.record.state.values() if self.record else ())]
        further = [*remembered, self.positions, self.scale, *(() if self.elsewhere else (self.buf,))]
        aside = None if self.record is None else self.record.aside
        here = aside.nbytes if aside and not aside.mappings and aside.device == self.device else 0
        return sum(x.nbytes for x in further if x is not None) + here

    @property
    def host_bytes(self) -> int:
        """Bytes that lie in host memory, away from the device or set aside by a policy."""
        aside = None if self.record is None else self.record.aside
        own = 0 if self.layout.home is None else self.buf.nbytes
        return own + (aside.nbytes if aside and not aside.mappings else 0)

    @property
    def elsewhere(self) -> bool:
        """Whether the tokens lie in a file, or in the memory of the host alone."""
        return self.mapping is not None or self.layout.home is not None

    @property
    def inner(self) -> dict[str, Tensor]:
        """The tensors that a graph reads, by the names of ``kv.inner_names``."""
        table = None if self.table is None else self.table.buf
        found = {"buf": self.buf, "positions": self.positions, "table": table, "scale": self.scale}
        found |= {f"prefix{index}": prefix.storage.buf for index, prefix in enumerate(self.prefixes)}
        for index, part in enumerate(self.classes):
            found |= {f"class{index}": part.buf, f"places{index}": part.positions}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def sorted(self) -> int:
        """Tokens of each head that are in classes."""
        return sum(part.filled for part in self.classes)

    @property
    def parts(self) -> tuple[Storage | RotaryTable, ...]:
        """What memory is behind a row: the storages of its prefixes and classes, this one, and its table."""
        own: tuple[Storage | RotaryTable, ...] = (self,) if self.table is None else (self, self.table)
        return (*(prefix.storage for prefix in self.prefixes), *self.classes, *own)

    def stored(self, start: int, end: int) -> int:
        """Tokens that every row and head has of its prefixes, its classes and slots ``start .. end``."""
        return self.offset + self.sorted + end - start

    def lengths(self, start: int, end: int, logical: int) -> tuple[int, ...]:
        """What kernels are told of slots ``start .. end`` of a sequence of ``logical`` columns."""
        return start, end, logical - self.offset

    def rest(self, mapping: mmap | None) -> None:
        """Leave a buffer that was just filled to its file, if it has one."""
        self.mapping = mapping
        if mapping is not None:
            offload.release(mapping)

    def intact(self, end: int, age: int) -> bool:
        """Whether nothing before slot ``end`` was overwritten since cut number ``age``."""
        return all(cut.first >= end for cut in self.cuts[age:])

    def read(self, start: int, end: int, age: int | None = None) -> Tensor:
        """Slots ``start .. end`` as ``[B, H, n, width]`` in the model's dtype, as they were at cut number ``age``.

        Behind the D numbers of a token stand its latents, where the format has such.
        """
        age = len(self.cuts) if age is None else age
        if self.intact(end, age):
            return self._present(start, end)
        present = self._present(start, min(end, self.filled))
        tokens = present.new_empty(*present.shape[:2], end - start, present.shape[3])
        tokens[:, :, : present.shape[2]].copy_(present)
        for cut in reversed(self.cuts[age:]):
            low, high = max(cut.first, start), min(cut.first + cut.tokens.shape[2], end)
            if low < high:
                tokens[:, :, low - start : high - start].copy_(cut.tokens[:, :, low - cut.first : high - cut.first])
        return tokens

    def _present(self, start: int, end: int) -> Tensor:
        """Slots ``start .. end`` as they are now, as ``read`` gives them."""
        fmt, factors = self.layout.format, self.layout.factors
        if factors is None:
            return kv_format.read(fmt, self.buf, start, end, self.filled).to(self.device)
        columns = torch.arange(start, max(start, end), device=self.buf.device).expand(self.buf.shape[0], -1)
        table = None if self.table is None else self.table.buf
        return latents.read_wide(fmt, self.buf, start, end, self.filled, factors.projection, table, columns)

    def merged(self, start: int, end: int, age: int) -> Tensor:
        """The tokens of all classes and slots ``start .. end``, in the order of their columns: ``[B, H, n, D]``."""
        parts = [part.read(0, part.filled) for part in self.classes]
        tokens = torch.cat([*parts, self.read(start, end, age)], 2)
        places = [part.positions[..., : part.filled].long() for part in self.classes if part.positions is not None]
        last = torch.arange(self.sorted, tokens.shape[2], device=tokens.device)
        where = torch.cat([*places, last.expand(*tokens.shape[:2], -1)], 2)[..., None].expand_as(tokens)
        tokens = torch.empty_like(tokens).scatter_(2, where, tokens)
        return tokens if self.scale is None else tokens * self.scale

    @torch.inference_mode(False)
    @torch.no_grad()
    def keep(self, start: int, end: int, kept: Tensor, logical: int) -> None:
        """Keep, of slots ``start .. end``, those that ``kept`` ``[B, H, n]`` names from ``start`` on, in slots 0 .. n.

        Views made before can be read no more. logical: the sequence's length; nothing before it can be cut apart.
        """
        columns = None if self.positions is None else self.positions[..., start:end].gather(2, kept)
        if self.record is not None:
            count = kept.shape[2]
            for x in self.record.state.values():
                x[..., :count] = x[..., start:end].gather(2, kept)
                x[..., count:] = 0
        tokens = self.read(start, end)
        self.refill(tokens.gather(2, kept[..., None].expand(*kept.shape, tokens.shape[3])), columns, logical)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refill(self, tokens: Tensor, columns: Tensor | None, logical: int) -> None:
        """Hold ``tokens`` ``[B, H, n, D]``, as ``read`` gives them, and nothing else, in slots 0 .. n.

        Views made before can be read no more. columns: integers ``[B, H, n]``, where there are positions. logical: the
        sequence's length; nothing before it can be cut apart.
        """
        count, fmt = tokens.shape[2], self.layout.format
        if count >= self.capacity or 2 * grown(count) <= self.capacity:
            self._resize(grown(count))
        kv_format.append(fmt, self.buf, 0, tokens)
        if self.positions is not None and columns is not None:
            self.positions[..., :count] = columns
        self.cuts.clear()
        self.filled, self.contiguous_from = count, logical
        self.generation += 1

    def _resize(self, room: int) -> None:
        """Exchange the buffer for one of ``room`` slots, whatever is in it; what a policy remembers keeps its place."""
        fmt = self.layout.format
        self.buf = kv_format.allocate(fmt, self.buf.shape[0], self.buf.shape[1], room, self.buf.device)
        self.capacity = kv_format.capacity(fmt, self.buf)
        torch._dynamo.maybe_mark_dynamic(self.buf, 2)
        if self.positions is not None:
            self.positions = self.positions.new_empty(*self.positions.shape[:2], self.capacity)
            torch._dynamo.maybe_mark_dynamic(self.positions, 2)
        if self.record is not None:
            fit = self.capacity
            self.record.state = {
                name: torch.nn.functional.pad(x[..., :fit], (0, fit - min(fit, x.shape[2])))
                for name, x in self.record.state.items()
            }

    def truncate(self, end: int) -> None:
        """Give up the slots from ``end`` on, keeping their tokens for whoever alive still reads them."""
        if end >= self.filled:
            return
        fmt = self.layout.format
        if any(view.end > end for view in self.views.values()):
            self.cuts.append(Cut(end, self._present(end, self.filled).clone()))
        # Tokens of a block that is opened again are as exact as their latents from then on.
        reopened = None if self.layout.factors is None else self._present(fmt.quantised(end), end)
        kv_format.truncate(fmt, self.buf, self.filled, end, reopened)
        if self.record is not None:
            for x in self.record.state.values():
                x[..., end:] = 0  # what comes next begins anew
            if self.record.aside is not None:
                self.record.aside = self.record.aside.take(None, self.filled - end)
        self.filled = end
        if self.layout.selection is not None:
            self.layout.selection.restore(self.state, self.read, end, end)

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(
        self, start: int, end: int, room: int, batch: Tensor | None = None, age: int | None = None
    ) -> tuple[Storage, int]:
        """A storage of its own for slots ``start .. end`` with room for ``room`` more; returns it and its start.

        batch: int64 ``[B']`` rows to take (beam search), or None for all. age: see ``read``. The prefixes stay shared:
        the rows taken must read them as their places say (see ``Prefix``).
        """
        fmt = self.layout.format
        pick = (lambda t: t) if batch is None else (lambda t: t.index_select(0, batch))
        rows, heads = (self.rows if batch is None else batch.shape[0]), self.heads
        # Whole quantised blocks are moved as they are: their codes must not be made anew.
        intact = self.intact(end, len(self.cuts) if age is None else age)
        base = start - start % fmt.block if fmt.is_blocked and intact else start
        buf, mapping = _allocate(self.layout, rows, heads, grown(end - base + room), self.buf.device)
        slots = None
        if self.positions is not None:
            slots = self.positions.new_empty(rows, self.positions.shape[1], kv_format.capacity(fmt, buf))
            slots[..., : end - base].copy_(pick(self.positions[..., base:end]))
        if fmt.is_blocked and intact:
            done = max(base, fmt.quantised(end))
            size = (done - base) // fmt.block * fmt.block_bytes
            lo = fmt.tail_bytes + base // fmt.block * fmt.block_bytes
            buf[..., fmt.tail_bytes : fmt.tail_bytes + size].copy_(pick(self.buf[..., lo : lo + size]))
            kv_format.tail(fmt, buf)[:, :, : end - done].copy_(pick(self.read(done, end)))
        elif fmt.kind != "empty":
            kv_format.append(fmt, buf, 0, pick(self.read(base, end, age)))
        table = self.table if batch is None or self.table is None else self.table.taken(batch)
        new = Storage(self.layout, buf, end - base, slots, self.contiguous_from, self.prefixes, table)
        new.classes = tuple(part.copy(0, part.filled, 1, batch)[0] for part in self.classes)
        new.scale = None if self.scale is None else pick(self.scale)
        new.rest(mapping)
        if self.record is not None:
            room = new.capacity - (end - base)
            state = {
                name: torch.nn.functional.pad(pick(x[..., base:end]), (0, room))
                for name, x in self.record.state.items()
            }
            aside = None if self.record.aside is None else self.record.aside.take(batch, self.filled - end)
            new.record = EvictionRecord(state, self.record.capacity, self.record.calls, aside)
        policy = self.layout.selection
        if policy is not None:
            new.state = copied(policy, self.state, new.sizes, batch)
            # Of slots that others overwrote since, the state is that of the others.
            good = min([end, *(cut.first for cut in self.cuts[len(self.cuts) if age is None else age :])])
            if good < self.filled:
                policy.restore(new.state, new.read, good, end)
        return new, start - base

    def moved(self, device: torch.device, prefixes: tuple[Prefix, ...] = ()) -> Storage:
        """A copy on another device; prefixes: there already."""
        slots = None if self.positions is None else self.positions.to(device)
        factors = None if self.layout.factors is None else self.layout.factors.to(device)
        layout = replace(self.layout, factors=factors, home=None)
        table = None if self.table is None else self.table.to(device)
        classes = tuple(part.moved(device) for part in self.classes)
        scale = None if self.scale is None else self.scale.to(device)
        new = Storage(
            layout, self.buf.to(device), self.filled, slots, self.contiguous_from, prefixes, table, classes, scale
        )
        if self.record is not None:
            state = {name: x.to(device) for name, x in self.record.state.items()}
            new.record = replace(self.record, state=state)
        policy = self.layout.selection
        host = frozenset() if policy is None else policy.host
        new.state = {name: x.clone() if name in host else x.to(device) for name, x in self.state.items()}
        return new


def sizes(fmt: KVFormat, buf: Tensor) -> Sizes:
    """The sizes of a buffer of a format, symbolic ones for a fake buffer."""
    return Sizes(buf.shape[0], buf.shape[1], kv_format.capacity(fmt, buf), fmt.head_dim, DTYPES[fmt.dtype])


def grown(need: int) -> int:
    """Capacity to allocate for ``need`` slots; strictly larger, so length never meets capacity."""
    slack = min(max(need // SLACK, 1), MOST_SLACK)
    return -(-(need + slack) // ALIGNMENT) * ALIGNMENT


@torch.inference_mode(False)
@torch.no_grad()
def store(
    layout: Layout, tokens: Tensor, logical: int, positions: Tensor | None = None, table: RotaryTable | None = None
) -> Storage:
    """Compress ``tokens`` ``[B, H, n, width]`` into a new storage.

    positions: integers ``[B, 1 | H, n]``, the column of each token, for layouts with positions; None for 0 .. n.
    table: for layouts that are ``turned``. The state of the layout's selection is zeros yet.
    """
    batch, heads, n, _ = tokens.shape
    buf, mapping = _allocate(layout, batch, heads, grown(n), tokens.device)
    # Quantising 32k tokens of 4 heads takes 6 ms here, and 92-180 ms operator by operator.
    registry.append(layout.format, buf.device.type).run(buf, 0, rotation.stored(layout.format, tokens).to(buf.device))
    slots = None
    if layout.positions:
        room = kv_format.capacity(layout.format, buf)
        columns = torch.arange(n, device=tokens.device).view(1, 1, -1) if positions is None else positions
        slots = torch.empty(batch, columns.shape[1], room, dtype=torch.int32, device=tokens.device)
        slots[..., :n] = columns.to(torch.int32)
    stored = Storage(layout, buf, n, slots, logical if layout.pruned else 0, table=table)
    stored.rest(mapping)
    if layout.selection is not None:
        stored.state = layout.selection.allocate(stored.sizes, tokens.device)
    return stored


def _allocate(layout: Layout, rows: int, heads: int, capacity: int, device: torch.device) -> tuple[Tensor, mmap | None]:
    """A buffer, and its mapping where it lies in a file."""
    if layout.home is not None:
        return offload.host(layout.format, rows, heads, capacity, torch.device(layout.home)), None
    if layout.offload is None or layout.format.kind == "empty":
        buf = kv_format.allocate(layout.format, rows, heads, capacity, device)
        huge_pages.advise(buf)
        return buf, None
    if device.type != "cpu":
        raise OffloadError(
            f"asked to keep a KV cache of device {device} in a file of {layout.offload!r}, which only CPUs can read; "
            "leave the option offload out"
        )
    return offload.allocate(layout.format, rows, heads, capacity, layout.offload)
