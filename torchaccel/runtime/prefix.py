"""Rows that begin with the same tokens: one copy of these, read by all of them (Hydragen, arXiv 2402.05099)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchaccel.kernels import kv_format

from .storage import Prefix, Storage, grown

# Tokens below which rows get copies. It is memory that decides: a row's own buffer has 64 slots at least. In time, two
# more kernels cost about 50 us a layer (4 rows, 2 threads), so short prefixes of few rows are slower than copies.
MIN_TOKENS = 128
# A prefix, and one within it; a tree of answers that grows deeper copies the tokens of its lower branches.
MAX_PREFIXES = 2


def take_rows(storage: Storage, start: int, end: int, age: int, rows: Tensor) -> tuple[Storage, int]:
    """A storage for ``rows`` int64 ``[B']`` of slots ``start .. end`` and of the prefixes; returns it and its start.

    age: see ``Storage.read``. Rows of which each is taken several times in a row share their tokens, which are not
    copied, and ``storage`` is read-only while they do. Prefixes stay shared where the rows taken still lie in equal
    groups. Everything else is copied; ``Storage.unshared`` of the copy says why, where sharing was to be expected.
    """
    batch = storage.rows
    times = _times(rows, batch)
    problem = None
    if times > 1 and end - start >= MIN_TOKENS:
        problem = _problem(storage, start)
        if problem is None:
            return _share(storage, end, age, times), 0
    if not all(_in_groups(prefix, rows, batch) for prefix in storage.prefixes):
        return flatten(storage, storage.offset + end, age, rows, "rows of different prefixes were mixed"), 0
    new, first = storage.copy(start, end, 1, rows, age)
    new.unshared = problem
    return new, first


def read(storage: Storage, start: int, end: int, age: int) -> Tensor:
    """The prefixes and slots ``start .. end``, as ``[B, H, n, D]``; age: see ``Storage.read``."""
    own = storage.read(start, end, age)
    if not storage.prefixes:
        return own
    batch = own.shape[0]
    shared = [
        prefix.storage.read(0, prefix.tokens).repeat_interleave(batch // prefix.entries, 0)
        for prefix in storage.prefixes
    ]
    return torch.cat([*shared, own], 2)


@torch.inference_mode(False)
@torch.no_grad()
def flatten(storage: Storage, columns: int, age: int, rows: Tensor | None = None, reason: str | None = None) -> Storage:
    """A storage without prefixes for the first ``columns`` tokens of every row, or of ``rows`` int64 ``[B']``.

    reason: becomes ``Storage.unshared``. Whole blocks of the first prefix keep their codes; what comes behind is
    quantised anew, since it begins within a block.
    """
    batch, buf = storage.buf.shape[0], storage.buf
    rows = torch.arange(batch, device=buf.device) if rows is None else rows
    first, *others = [(prefix.storage, prefix.tokens, batch // prefix.entries) for prefix in storage.prefixes]
    tokens = min(columns, first[1])
    flat, _ = first[0].copy(0, tokens, columns - tokens + 1, rows // first[2])
    for part, tokens, share in (*others, (storage, columns, 1)):
        tokens = min(tokens, columns - flat.filled)
        new = part.read(0, tokens, age if part is storage else None).index_select(0, rows // share)
        kv_format.append(flat.layout.format, flat.buf, flat.filled, new)
        flat.filled += tokens
    flat.unshared = reason
    return flat


def moved(storage: Storage, device: torch.device) -> Storage:
    """A copy of the storage, and of its prefixes, on another device."""
    prefixes = tuple(Prefix(prefix.storage.moved(device), prefix.tokens) for prefix in storage.prefixes)
    return storage.moved(device, prefixes)


@torch.inference_mode(False)
@torch.no_grad()
def _share(storage: Storage, end: int, age: int, times: int) -> Storage:
    """A storage without tokens of its own, of which ``times`` neighbouring rows each read a row of ``storage``."""
    fmt = storage.layout.format
    # Tokens that were given up lie elsewhere, and codes can only be read up to where they were filled.
    if not storage.intact(end, age) or (fmt.is_quantised and end != storage.filled):
        storage, _ = storage.copy(0, end, 0, age=age)
    batch, heads = storage.buf.shape[:2]
    buf = kv_format.allocate(fmt, batch * times, heads, grown(1), storage.buf.device)
    return Storage(storage.layout, buf, 0, None, 0, (*storage.prefixes, Prefix(storage, end)))


def _times(rows: Tensor, batch: int) -> int:
    """How often in a row each of ``batch`` rows is taken, one after another; 1 when they are taken otherwise."""
    times, rest = divmod(rows.shape[0], max(batch, 1))
    if times < 2 or rest:
        return 1
    # Comparing waits for a GPU: not in every step of a beam search, where the batch does not grow.
    return times if torch.equal(rows, torch.arange(batch, device=rows.device).repeat_interleave(times)) else 1


def _problem(storage: Storage, start: int) -> str | None:
    """Why repeated rows of a storage cannot share their tokens; None when they can."""
    if storage.layout.pruned:
        return "pruned tokens are not shared"
    if storage.layout.factors is not None:
        return "latents are not shared"
    if storage.layout.selection is not None:
        return f"what {type(storage.layout.selection).__name__} remembers of tokens is not shared"
    if start:
        return "a sliding window is not shared"
    if len(storage.prefixes) == MAX_PREFIXES:
        return f"there are {MAX_PREFIXES} shared prefixes already"
    return None


def _in_groups(prefix: Prefix, rows: Tensor, batch: int) -> bool:
    """Whether row j of the rows taken reads what place j says (see ``Prefix``); False where a GPU had to be asked."""
    entries, count = prefix.entries, rows.shape[0]
    if entries == 1:
        return True
    if count % entries or (rows.device.type != "cpu" and count <= batch):
        return False
    expected = torch.arange(entries, device=rows.device).repeat_interleave(count // entries)
    return torch.equal(rows // (batch // entries), expected)
