"""Stores prompts by classes of tokens, and sorts the newest tokens into the classes as they grow in number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat

from .bindings import PromptBinding
from .evicting import prompt_of
from .eviction import Prompt
from .kv import LogicalKV, view
from .layout import Layout
from .mixing import channel_scale, taken, without_padding
from .storage import Storage, store
from .waiting import waiting


@torch.inference_mode(False)
@torch.no_grad()
def store_mixed(
    layouts: tuple[Layout, Layout], binding: PromptBinding, results: list[Any], keys: Tensor, values: Tensor
) -> tuple[LogicalKV, LogicalKV]:
    """The logical keys and values ``[B, H_kv, S, D]`` of a prompt, all of it sorted into classes."""
    mixing, logical = layouts[0].mixing, keys.shape[2]
    assert mixing is not None
    prompt = prompt_of(layouts, binding, results, keys, values)
    members = mixing.sort(prompt)
    scale = channel_scale(values, prompt.valid)
    parts = without_padding(keys, prompt.valid), without_padding(values / scale, prompt.valid)
    stored = []
    for which, (layout, x) in enumerate(zip(layouts, parts, strict=True)):
        formats = [of_class[which] for of_class in mixing.formats]
        classes = _classes(x, formats, members)
        stored.append(waiting(layout, x[:, :, :0], logical, classes, scale if which else None, mixing.interval))
    return view(stored[0], 0, 0, logical), view(stored[1], 0, 0, logical)


def _classes(x: Tensor, formats: list[KVFormat], members: tuple[Tensor, ...]) -> tuple[Storage, ...]:
    """A storage for each class of tokens x ``[B, H, S, D]``."""
    return tuple(
        store(Layout(fmt, positions=True, pruned=True), taken(x, places), x.shape[2], places)
        for fmt, places in zip(formats, members, strict=True)
    )


@torch.inference_mode(False)
@torch.no_grad()
def sort_newest(keys: LogicalKV, values: LogicalKV, queries: Tensor, scale: float) -> int:
    """Sort the newest tokens into the classes when there are enough of them; returns how many are left.

    keys, values: as they are after a call. queries: that call's, ``[B, H, Q, D]``; scale: of q . k.
    """
    storages = keys.physical, values.physical
    assert storages[0] is not None and storages[1] is not None
    mixing, end = storages[0].layout.mixing, keys.end
    assert mixing is not None and storages[0].positions is not None
    if end < mixing.interval:
        return end
    tails = [storage.buf[:, :, :end] for storage in storages if storage is not None]
    valid = torch.ones(keys.shape[0], end, dtype=torch.bool, device=keys.device)
    members = mixing.sort(Prompt(queries[:, :, -1:], tails[0], tails[1], None, valid, scale, 0, 1, 0.0))
    columns = storages[0].positions[..., :end].expand(-1, keys.shape[1], -1)
    for storage, tail in zip(storages, tails, strict=True):
        assert storage is not None
        storage.classes = tuple(
            _added(part, taken(tail, places), columns.gather(2, places))
            for part, places in zip(storage.classes, members, strict=True)
        )
        storage.cuts.clear()
        storage.filled, storage.contiguous_from = 0, keys.shape[2]
        storage.generation += 1
    return 0


def _added(part: Storage, tokens: Tensor, columns: Tensor) -> Storage:
    """A class with further tokens ``[B, H, n, D]`` of ``columns`` int32 ``[B, H, n]``."""
    n = tokens.shape[2]
    if part.filled + n > part.capacity:
        part, _ = part.copy(0, part.filled, n)
    assert part.positions is not None
    kv_format.append(part.layout.format, part.buf, part.filled, tokens)
    part.positions[..., part.filled : part.filled + n] = columns
    part.filled += n
    return part
