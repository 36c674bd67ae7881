"""Runs policies on the caches of a compiled graph: after a prompt, and those that evict after every later call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchaccel.kernels import rotation

from .aside import set_aside
from .bindings import PromptBinding
from .eviction import Eviction, EvictionRecord, Prompt, RaggedEviction, Step
from .kv import LogicalKV, compress, view
from .layout import Layout
from .ragged import store_ragged
from .selection import Selection
from .storage import Storage


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
    prompt = prompt_of(layouts, binding, results, keys, values, columns)
    if isinstance(policy, RaggedEviction):
        ragged = store_ragged(layouts, keys, values, policy.kept(prompt), logical, columns)
        return view(ragged[0], 0, logical, logical), view(ragged[1], 0, logical, logical), None
    kept, whole = given, columns
    if kept is None and policy is not None:
        kept = policy.keep(prompt)
    if kept is not None:
        keys, values = (policy or Eviction()).merge(prompt, kept)
        columns = kept if columns is None else columns.expand(-1, kept.shape[1], -1).gather(2, kept)
    stored = compress(layouts[0], keys, logical, columns)
    storage = stored.physical
    assert storage is not None
    if policy is not None and kept is not None:
        room = storage.capacity - kept.shape[2]
        state = {name: torch.nn.functional.pad(x, (0, room)) for name, x in policy.state(prompt, kept).items()}
        storage.record = EvictionRecord(state, policy.capacity(prompt))
        if policy.later_queries and storage.record.capacity < prompt.keys.shape[2]:
            storage.record.aside = set_aside(prompt, whole, kept.shape[2], policy.folder)
    if layouts[0].selection is not None:
        _remember(storage, layouts[0].selection, prompt, keys, kept)
    return stored, compress(layouts[1], values, logical), kept


@torch.inference_mode(False)
@torch.no_grad()
def _remember(storage: Storage, policy: Selection, prompt: Prompt, keys: Tensor, kept: Tensor | None) -> None:
    """Let a policy that selects see the ``keys`` ``[B, H_kv, n, D]`` that are stored of a prompt."""
    # The heads keep different tokens, but equally many of the padding, which comes before them.
    valid = prompt.valid if kept is None else prompt.valid.gather(1, kept[:, 0])
    storage.state["first"].copy_(torch.where(valid.any(-1), valid.int().argmax(-1), keys.shape[2]))
    policy.begin(storage.state, prompt, keys, kept)


def prompt_of(
    layouts: tuple[Layout, Layout],
    binding: PromptBinding,
    results: list[Any],
    keys: Tensor,
    values: Tensor,
    columns: Tensor | None = None,
) -> Prompt:
    """What the policy of ``layouts`` is told of a prompt with keys and values ``[B, H_kv, S, D]``.

    columns: int64 ``[B, 1, S]`` when tokens were pruned before, else None.
    """
    tables = binding.table_outputs
    ids = None if binding.ids_output is None else results[binding.ids_output]
    images = [results[output] for output in binding.image_outputs]
    filled = torch.stack(images).any(0) if images else None
    if columns is not None:
        ids, filled = (None if x is None else x.gather(1, columns[:, 0]) for x in (ids, filled))
    return Prompt(
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
        images=filled,
    )


def settle(
    keys: LogicalKV,
    values: LogicalKV,
    mass: Tensor | None,
    fresh: int,
    group: int,
    ids: Tensor | None,
    queries: Tensor | None,
) -> int | None:
    """Tell the policy of a layer what a call attended to and let it choose what stays; returns how many tokens.

    None where nothing changes.

    keys, values: as they are after the call, ``fresh`` new tokens included. mass: float32 ``[B, H_kv, C]``, see
    ``Step``. group: query heads of a KV head. ids, queries: of the new tokens, if any.
    """
    storage, start, end = keys.physical, keys.start, keys.end
    assert storage is not None and values.physical is not None
    policy, record = storage.layout.eviction, storage.record
    assert policy is not None and record is not None
    received = None if mass is None else mass[..., start:end]
    step = Step(received, end - start, fresh, group, record.calls + 1, ids)
    state = {name: x[..., start:end] for name, x in record.state.items()}
    record.calls += 1
    if policy.later_queries:
        if record.aside is None or queries is None:
            return None
        record.aside = record.aside.asked(queries, policy.later_queries)
        return _recall(keys, values.physical, step) if policy.due(step) else None
    policy.observe(state, step)
    kept = policy.evict(state, step, record.capacity)
    if kept is None:
        return None
    storage.keep(start, end, kept, keys.shape[2])
    values.physical.keep(start, end, kept, keys.shape[2])
    return kept.shape[2]


def _recall(keys: LogicalKV, values: Storage, step: Step) -> int:
    """Let the policy choose anew from the whole prompt; returns how many tokens are stored then."""
    storage, end = keys.physical, keys.end
    assert storage is not None and storage.record is not None and storage.positions is not None
    policy, aside = storage.layout.eviction, storage.record.aside
    assert policy is not None and aside is not None
    prompt, columns = aside.load(storage.device)
    kept = policy.recall(prompt, step, storage.record.capacity)
    if columns is not None:
        columns = columns.expand(-1, kept.shape[1], -1).gather(2, kept)
    later = storage.positions[..., aside.slots : end].expand(-1, kept.shape[1], -1)
    places = torch.cat([(kept if columns is None else columns).to(later.dtype), later], 2)
    for part, tokens in zip((storage, values), policy.merge(prompt, kept), strict=True):
        stored = rotation.stored(part.layout.format, tokens)
        # What lies behind the prompt stays as it was: it can be cut apart, as before.
        part.refill(torch.cat([stored, part.read(aside.slots, end)], 2), places, part.contiguous_from)
    storage.record.aside = replace(aside, slots=kept.shape[2])
    aside.rest()
    return places.shape[2]


def _valid(mask: Tensor | None, keys: Tensor) -> Tensor:
    """Which tokens are no padding, bool ``[B, S]``, from the mask's last row ``[B | 1, 1, 1, S]``."""
    if mask is None:
        return torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed[:, 0, 0].expand(keys.shape[0], -1)
