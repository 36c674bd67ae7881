"""Runs policies on the caches of a compiled graph: after a prompt, and those that evict after every later call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bindings import PromptBinding
from .eviction import EvictionRecord, Prompt, Step
from .kv import LogicalKV, compress
from .selection import Selection
from .storage import Layout, Storage


def store_prompt(
    layouts: tuple[Layout, Layout],
    binding: PromptBinding,
    results: list[Any],
    keys: Tensor,
    values: Tensor,
    logical: int,
    columns: Tensor | None,
    given: Tensor | None = None,
) -> tuple[LogicalKV, LogicalKV, Tensor | None]:
    """The logical keys and values of a prompt, as the policies of ``layouts`` want it, and which tokens stay.

    keys, values: ``[B, H_kv, S, D]``. columns: int64 ``[B, 1, S]`` when tokens were pruned before, else None. given:
    int64 ``[B, H_kv, n]``, the tokens that another layer chose for this one, too. The third result is like ``given``,
    None for all tokens.
    """
    policy = layouts[0].eviction
    tables = binding.table_outputs
    ids = None if binding.ids_output is None else results[binding.ids_output]
    if ids is not None and columns is not None:
        ids = ids.gather(1, columns[:, 0])
    prompt = Prompt(
        queries=results[binding.queries_output],
        keys=keys,
        values=values,
        mass=None if binding.mass_output is None else results[binding.mass_output],
        valid=_valid(None if binding.mask_output is None else results[binding.mask_output], keys),
        scale=binding.scale,
        layer=binding.layer,
        layers=binding.layers,
        token_bytes=keys.shape[1] * sum(layout.format.token_bytes for layout in layouts),
        plain_queries=None if binding.plain_output is None else results[binding.plain_output],
        tables=None if tables is None else (results[tables[0]], results[tables[1]]),
        pairs=binding.pairs,
        ids=ids,
    )
    kept = policy.keep(prompt) if policy is not None and given is None else given
    if kept is not None:
        where = kept[..., None].expand(-1, -1, -1, keys.shape[3])
        keys, values = keys.gather(2, where), values.gather(2, where)
        columns = kept if columns is None else columns.expand(-1, keys.shape[1], -1).gather(2, kept)
    stored = compress(layouts[0], keys, logical, columns)
    storage = stored.physical
    assert storage is not None
    if policy is not None and kept is not None:
        room = storage.capacity - kept.shape[2]
        state = {name: torch.nn.functional.pad(x, (0, room)) for name, x in policy.state(prompt, kept).items()}
        storage.record = EvictionRecord(state, policy.capacity(prompt))
    if layouts[0].selection is not None:
        _remember(storage, layouts[0].selection, prompt, keys, kept)
    return stored, compress(layouts[1], values, logical), kept


@torch.inference_mode(False)
@torch.no_grad()
def _remember(storage: Storage, policy: Selection, prompt: Prompt, keys: Tensor, kept: Tensor | None) -> None:
    """Let a policy that selects see the ``keys`` ``[B, H_kv, n, D]`` that are stored of a prompt."""
    storage.state = policy.allocate(storage.sizes, keys.device)
    # The heads keep different tokens, but equally many of the padding, which comes before them.
    valid = prompt.valid if kept is None else prompt.valid.gather(1, kept[:, 0])
    storage.state["first"].copy_(torch.where(valid.any(-1), valid.int().argmax(-1), keys.shape[2]))
    policy.begin(storage.state, prompt, keys, kept)


def settle(
    keys: LogicalKV, values: LogicalKV, mass: Tensor | None, fresh: int, group: int, ids: Tensor | None
) -> tuple[int, int]:
    """Tell the policy of a layer what a call attended to and evict what it gives up; returns the live slots.

    keys, values: as they are after the call, ``fresh`` new tokens included. mass: float32 ``[B, H_kv, C]``, see
    ``Step``. group: query heads of a KV head. ids: of the new tokens, if any.
    """
    storage, start, end = keys.physical, keys.start, keys.end
    assert storage is not None and values.physical is not None
    policy, record = storage.layout.eviction, storage.record
    assert policy is not None and record is not None
    received = None if mass is None else mass[..., start:end]
    step = Step(received, end - start, fresh, group, record.calls + 1, ids)
    state = {name: x[..., start:end] for name, x in record.state.items()}
    policy.observe(state, step)
    record.calls += 1
    kept = policy.evict(state, step, record.capacity)
    if kept is None:
        return start, end
    storage.keep(start, end, kept, keys.shape[2])
    values.physical.keep(start, end, kept, keys.shape[2])
    return 0, kept.shape[2]


def _valid(mask: Tensor | None, keys: Tensor) -> Tensor:
    """Which tokens are no padding, bool ``[B, S]``, from the mask's last row ``[B | 1, 1, 1, S]``."""
    if mask is None:
        return torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed[:, 0, 0].expand(keys.shape[0], -1)
