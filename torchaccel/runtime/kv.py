"""Logical KV tensors: ordinary tensors to the model, compressed storage underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from torchaccel.errors import EvictedTokensError
from torchaccel.kernels import rotation
from torchaccel.kernels.spec import DTYPES

from .layout import Layout
from .prefix import flatten, moved, read, take_rows
from .rotary_table import RotaryTable
from .storage import Storage, store
from .waiting import unsorted

aten = torch.ops.aten


class LogicalKV(Tensor):
    """The keys or values of one layer, ``[B, H_kv, S, D]`` as far as anyone can see.

    ``physical`` holds what the layout keeps of them in slots ``start .. end``. Without positions slot ``start + j`` is
    column j, or the j-th behind the tokens of shared prefixes; with positions fewer than S tokens are stored; a ragged
    layout counts columns as slots. Slicing
    the sequence, selecting or repeating batch rows, ``clone``, ``detach`` and ``to`` keep the layout, except that rows
    that are repeated share their tokens from then on, as ``prefix0``, ``prefix1``; any other operation reads the tokens
    back, or raises ``EvictedTokensError`` when some are gone.
    """

    physical: Storage | None
    buf: Tensor
    kv_layout: Layout
    start: int
    end: int
    age: int
    generation: int

    @staticmethod
    def __new__(cls, layout: Layout, inner: Mapping[str, Tensor], size: Any) -> LogicalKV:
        """Wrap the tensors that ``inner_names`` lists; ``size`` is the logical shape."""
        device = inner["buf"].device if layout.home is None else torch.device(layout.home)
        wrapper: LogicalKV = torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=DTYPES[layout.format.dtype], device=device, requires_grad=False
        )
        wrapper.kv_layout = layout
        wrapper.physical = None
        for name in inner_names(layout):
            setattr(wrapper, name, inner[name])
        return wrapper

    # The wrapper's attributes are all set in __new__: Tensor.__init__ must not see them.
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __tensor_flatten__(self) -> tuple[list[str], Layout]:
        return inner_names(self.kv_layout), self.kv_layout

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], layout: Layout, size: Any, stride: Any) -> LogicalKV:
        return LogicalKV(layout, inner, size)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LogicalKV(shape={tuple(self.shape)}, dtype={self.dtype}, layout={self.kv_layout})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        # A tensor's own way copies all attributes: the storage, and all that share it.
        if self.physical is None:
            return super().__deepcopy__(memo)
        return memo.setdefault(id(self), self.clone())

    def __getitem__(self, index: Any) -> Any:
        # A slice made by the dispatcher would be an autograd view of this tensor, and Dynamo cannot take views of
        # wrapper subclasses as inputs: cropping (assisted generation) is done here, on a level above.
        parts = index if isinstance(index, tuple) else (index,)
        if self.physical is not None and parts and parts[0] is Ellipsis:
            parts = (slice(None),) * (self.dim() - len(parts) + 1) + parts[1:]
        whole = [isinstance(part, slice) and part == slice(None) for part in parts]
        if self.physical is not None and len(parts) > 2 and all(whole[:2] + whole[3:]) and isinstance(parts[2], slice):
            cropped = _slice(self, 2, parts[2].start, parts[2].stop, parts[2].step or 1)
            if cropped is not NotImplemented:
                return cropped
        return super().__getitem__(index)

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
        """As of a tensor; along the batch the rows that are equal share their tokens."""
        # The dispatcher would show it in pieces, of which the first is a view.
        if self.physical is not None and dim in (0, -4) and isinstance(repeats, int) and repeats > 0:
            return _repeated(self, repeats)
        return super().repeat_interleave(repeats, dim, **kwargs)

    def expand(self, *sizes: Any, **kwargs: Any) -> Any:
        """As of a tensor; a single row that is expanded is shared."""
        size = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        whole = len(size) == 4 and all(n in (-1, own) for n, own in zip(size[1:], self.shape[1:], strict=True))
        if self.physical is not None and whole and self.shape[0] == 1 and size[0] > 0:
            return _repeated(self, size[0])
        return super().expand(*sizes, **kwargs)

    def dense(self) -> Tensor:
        """The tokens as a plain tensor ``[B, H_kv, S, D]``; raises ``EvictedTokensError`` when some are gone."""
        if self.physical is None:
            # Tracing with fake tensors: only shape, dtype and device exist.
            return self.buf.new_empty(self.shape, dtype=self.dtype, device=self.device)
        kept = self.physical.stored(self.start, self.end)
        if kept != self.shape[2]:
            raise EvictedTokensError(
                f"asked to read all {self.shape[2]} tokens of a KV cache that keeps {kept} of them "
                f"({self.kv_layout.format.kind} layout, {_pruning(self.kv_layout)}); pass this "
                "cache only to a model compiled with torchaccel, or compile without the method that evicts tokens"
            )
        if self.physical.classes:
            return live(self).merged(self.start, self.end, self.age)
        tokens = read(live(self), self.start, self.end, self.age)
        return rotation.restored(self.kv_layout.format, tokens[..., : self.kv_layout.format.head_dim])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LogicalKV) and first.physical is not None:
            handler = _LAYOUT_KEEPING.get(func)
            result = handler(first, *args[1:], **kwargs) if handler else NotImplemented
            if result is not NotImplemented:
                return result
        flat, _ = tree_flatten((args, kwargs))
        if func._schema.is_mutable and any(isinstance(t, LogicalKV) for t in flat):
            raise EvictedTokensError(
                f"{func} would change a torchaccel KV cache in place; make a plain copy of it first with "
                "torchaccel.to_dense(cache)"
            )
        plain = lambda t: t.dense() if isinstance(t, LogicalKV) else t  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def prefix_names(layout: Layout) -> list[str]:
    """The attributes of a logical tensor that hold the buffers of its shared prefixes."""
    return [f"prefix{index}" for index in range(layout.prefixes)]


def inner_names(layout: Layout) -> list[str]:
    """The attributes of a logical tensor that hold the tensors of its storage: what a compiled graph sees of it."""
    names = ["buf"] + ["positions"] * layout.positions + ["table"] * layout.turned + prefix_names(layout)
    if layout.ragged and layout.positions:
        names += ["pages", "tails"]
    if layout.mixing is not None:
        numbers = range(len(layout.mixing.formats))
        names += [f"class{index}" for index in numbers]
        names += [f"places{index}" for index in numbers] if layout.positions else ["scale"]
    return names


def view(storage: Storage, start: int, end: int, logical: int) -> LogicalKV:
    """A logical tensor of length ``logical`` over slots ``start .. end``, marked dynamic for Dynamo."""
    layout = storage.layout
    size = (storage.rows, storage.heads, logical, layout.format.head_dim)
    # A cache made under inference_mode may be used outside of it: its tensors are always ordinary ones.
    with torch.inference_mode(False):
        kv = LogicalKV(layout, storage.inner, size)
    kv.physical, kv.start, kv.end, kv.age = storage, start, end, len(storage.cuts)
    kv.generation = storage.generation
    storage.views[id(kv)] = kv
    # One decode graph for every length: without the mark Dynamo compiles a static length first.
    torch._dynamo.maybe_mark_dynamic(kv, 2)
    return kv


def compress(
    layout: Layout,
    tokens: Tensor,
    logical: int | None = None,
    positions: Tensor | None = None,
    table: RotaryTable | None = None,
) -> LogicalKV:
    """A logical tensor of its own storage from ``tokens`` ``[B, H, n, width]``; ``logical`` columns when some were
    pruned.

    positions: integers ``[B, 1 | H, n]``, the column of each token. table: for layouts that are ``turned``.
    """
    n = tokens.shape[2]
    logical = n if logical is None else logical
    kept = 0 if layout.format.kind == "empty" else n
    return view(store(layout, tokens, logical, positions, table), 0, kept, logical)


def _pruning(layout: Layout) -> str:
    """By what tokens of a layout were dropped."""
    return "pruned" if layout.eviction is None else type(layout.eviction).__name__


def live(kv: LogicalKV) -> Storage:
    """The storage of ``kv``; raises ``EvictedTokensError`` when tokens were evicted from it since ``kv`` was made."""
    storage = kv.physical
    if storage is None:
        raise ValueError("a fake KV tensor has no storage")
    if storage.generation != kv.generation:
        raise EvictedTokensError(
            "this KV cache was continued, and tokens were evicted from it since; copy a cache (copy.deepcopy) before "
            f"continuing it when it is to be used again ({type(storage.layout.eviction).__name__})"
        )
    return storage


def writable(kv: LogicalKV, room: int, *, copy: bool = False) -> LogicalKV:
    """``kv`` itself with ``room`` free slots behind it, or a copy when the buffer is full or was overwritten since.

    A buffer that rows of another tensor read as their prefix is copied, too; prefixes are not.
    """
    storage = live(kv)
    if storage.layout.format.kind == "empty":
        return kv
    if not copy and not storage.readers and kv.end + room <= storage.capacity and storage.intact(kv.end, kv.age):
        storage.truncate(kv.end)
        kv.age = len(storage.cuts)
        return kv
    new, start = storage.copy(kv.start, kv.end, room, age=kv.age)
    return view(new, start, start + kv.end - kv.start, kv.shape[2])


def unshared(kv: LogicalKV) -> LogicalKV:
    """``kv`` itself, or a copy without shared prefixes."""
    storage = kv.physical
    if storage is None or not storage.prefixes:
        return kv
    stored = storage.offset + kv.end
    return view(flatten(storage, stored, kv.age), 0, stored, kv.shape[2])


def to_dense(cache: Any) -> Any:
    """Replace every logical KV tensor of a cache (in place) by a plain tensor; returns the cache."""
    for layer in getattr(cache, "layers", []):
        for name in ("keys", "values"):
            kv = getattr(layer, name, None)
            if isinstance(kv, LogicalKV):
                setattr(layer, name, kv.dense().clone())
    return cache


def kv_bytes(cache: Any) -> int:
    """Bytes really allocated for a KV cache, or for an iterable of tensors; shared storage is counted once."""
    tensors: Iterable[Any]
    if hasattr(cache, "layers"):
        tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    else:
        tensors = tree_flatten(cache)[0]
    seen: dict[int, int] = {}
    for t in tensors:
        if isinstance(t, LogicalKV) and t.physical is not None:
            seen |= {id(part): part.nbytes for part in t.physical.parts}
        elif isinstance(t, Tensor):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(seen.values())


def _slice(kv: LogicalKV, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    size = kv.shape[dim]
    lo, hi, _ = slice(start, None if end is None or end > size else end).indices(size)
    if step == 1 and lo == 0 and hi == size:
        return _alias(kv)
    if dim % 4 != 2 or step != 1 or hi < lo:
        return NotImplemented
    storage = live(kv)
    if storage.layout.format.kind == "empty":
        return view(storage, 0, 0, hi - lo)
    if storage.layout.turned and lo:
        return NotImplemented  # slots of latents are columns, by which their keys are embedded
    if storage.layout.mixing is not None and not lo and hi < storage.contiguous_from:
        # How many tokens of a class go differs between heads: all wait to be sorted anew.
        return view(unsorted(storage, kv.dense()[:, :, :hi]), 0, hi, hi)
    if storage.layout.pruned:
        if lo or hi < storage.contiguous_from:
            raise EvictedTokensError(
                f"asked to crop a KV cache to columns {lo}..{hi}; its first {storage.contiguous_from} columns were "
                f"pruned together and cannot be cut apart ({_pruning(storage.layout)})"
            )
        return _aged(kv, view(storage, kv.start, kv.end - (size - hi), hi))
    if storage.layout.selection is not None and lo:
        raise EvictedTokensError(
            f"asked to crop a KV cache to columns {lo}..{hi}, but {type(storage.layout.selection).__name__} counts its "
            "blocks from the first column on; crop its end only"
        )
    if storage.prefixes and (lo or hi < storage.offset):
        flat = flatten(storage, hi, kv.age, reason="a shared prefix was cropped")
        return view(flat, lo, hi, hi - lo)
    return _aged(kv, view(storage, kv.start + lo, kv.start + hi - storage.offset, hi - lo))


def _take_rows(kv: LogicalKV, rows: Tensor) -> LogicalKV:
    storage = live(kv)
    new, start = take_rows(storage, kv.start, kv.end, kv.age, rows)
    # What is stored of the columns ends where the storage does.
    return view(new, start, new.filled, kv.shape[2])


def _repeated(kv: LogicalKV, times: int) -> LogicalKV:
    return _take_rows(kv, torch.arange(kv.shape[0], device=kv.device).repeat_interleave(times))


def _repeat(kv: LogicalKV, sizes: Sequence[int]) -> Any:
    return _repeated(kv, sizes[0]) if kv.shape[0] == 1 and sizes[0] > 0 and sizes[1:] == [1, 1, 1] else NotImplemented


def _index_select(kv: LogicalKV, dim: int, index: Tensor) -> Any:
    return _take_rows(kv, index) if dim % 4 == 0 else NotImplemented


def _index(kv: LogicalKV, indices: list[Tensor | None]) -> Any:
    rows = indices[0]
    if rows is None or any(i is not None for i in indices[1:]) or rows.dim() != 1:
        return NotImplemented
    return _take_rows(kv, rows.nonzero().flatten() if rows.dtype == torch.bool else rows)


def _clone(kv: LogicalKV, **_: Any) -> LogicalKV:
    storage = live(kv)
    new, start = storage.copy(kv.start, kv.end, 1, age=kv.age)
    return view(new, start, start + kv.end - kv.start, kv.shape[2])


def _alias(kv: LogicalKV) -> LogicalKV:
    return _aged(kv, view(live(kv), kv.start, kv.end, kv.shape[2]))


def _aged(source: LogicalKV, derived: LogicalKV) -> LogicalKV:
    derived.age = source.age
    return derived


def _to(kv: LogicalKV, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    if dtype not in (None, kv.dtype):
        return NotImplemented
    own = _clone(kv)
    storage = own.physical
    if storage is None or device is None or torch.device(device) == storage.device:
        return own
    return view(moved(storage, torch.device(device)), own.start, own.end, own.shape[2])


_LAYOUT_KEEPING: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.repeat.default: _repeat,
    aten.clone.default: _clone,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten._to_copy.default: _to,
}
