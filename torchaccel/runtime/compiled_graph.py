"""The callable that stands in the model: unwraps logical KV tensors, runs the compiled graph, wraps what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchaccel.errors import SharedPrefixError

from .bindings import AppendBinding, Bindings, LatentBinding, StoreBinding
from .call_counter import CallCounter
from .evicting import settle, store_prompt
from .kv import LogicalKV, compress, unshared, view, writable
from .layout import Layout
from .mixed import sort_newest, store_mixed
from .ragged import RaggedStorage
from .rotary_table import RotaryTable, rotary_table
from .storage import Storage


class CompiledGraph:
    """A rewritten and compiled graph with the signature of the one it replaces."""

    def __init__(self, compiled: Callable[..., Any], bindings: Bindings, counter: CallCounter):
        self.compiled = compiled
        self.bindings = bindings
        self.counter = counter
        self.slots = bindings.slots

    def __call__(self, *args: Any) -> list[Any]:
        """Run one step; arguments and results are those of the graph Dynamo captured."""
        began = time.perf_counter()
        bindings = self.bindings
        inputs = [plain(args[i]) for i in bindings.arguments]
        results: list[Any] = [None] * self.slots
        lens: dict[tuple[int, ...], Tensor] = {}
        appended = [self._append(append, args, inputs, results, lens) for append in bindings.appends]
        produced = self.compiled(*inputs)
        for position, value in zip(bindings.results, produced, strict=True):
            results[position] = value
        for append, (keys, values) in zip(bindings.appends, appended, strict=True):
            if append.evicts:
                self._settle(append, args, results, keys, values)
            elif isinstance(keys.physical, RaggedStorage) and keys.physical.oversized(keys.end):
                results[append.key_output], results[append.value_output] = keys.clone(), values.clone()
            if append.mixed:
                self._sort(append, results, keys, values)
        tables: dict[tuple[int, int], RotaryTable] = {}
        kept: list[Tensor | None] = []
        for store in bindings.stores:
            kept.append(self._store(store, args, results, tables, kept))
        self.counter.calls += 1
        self.counter.shares = [results[position] for position in bindings.shares]
        layers: list[AppendBinding | StoreBinding] = [*bindings.appends, *bindings.stores]
        self.counter.note((results[layer.key_output], results[layer.value_output]) for layer in layers)
        self.counter.seconds += time.perf_counter() - began
        return results[: bindings.result_count]

    def _append(
        self,
        binding: AppendBinding,
        args: tuple[Any, ...],
        inputs: list[Any],
        results: list[Any],
        lens: dict[tuple[int, ...], Tensor],
    ) -> tuple[LogicalKV, LogicalKV]:
        keys, values = args[binding.key_argument], args[binding.value_argument]
        n = binding.tokens.of(args)
        if not isinstance(keys, LogicalKV) or not isinstance(values, LogicalKV):
            keys, values = adopt(keys, binding.key_layout), adopt(values, binding.value_layout)
        if not binding.prefixes:
            keys, values = unshared(keys), unshared(values)
        if keys.physical is not None and keys.physical.unshared is not None:
            self.counter.unshared.add(keys.physical.unshared)
        keys, values = writable_pair(keys, values, n)
        logical = keys.shape[2]
        key_storage, value_storage = keys.physical, values.physical
        assert key_storage is not None and value_storage is not None
        if binding.skipped:
            end = keys.end
        else:
            lengths = key_storage.lengths(keys.start, keys.end, logical)
            inputs += [key_storage.buf, value_storage.buf]
            if binding.positions:
                inputs.append(key_storage.positions)
            if isinstance(key_storage, RaggedStorage):
                inputs += [key_storage.pages, key_storage.tails]
            if binding.prefixes:
                lengths += prefixes(key_storage, value_storage, inputs)
            if binding.mixed:
                lengths += classes(key_storage, value_storage, logical, inputs)
            if lengths not in lens:
                found = torch.tensor(lengths, dtype=torch.int64)
                lens[lengths] = found.view(-1, 3) if binding.prefixes or binding.mixed else found
            inputs.append(lens[lengths])
            if key_storage.table is not None:
                key_storage.table.reserve(logical + n)
                if binding.table:
                    inputs.append(key_storage.table.buf)
            inputs += key_storage.state.values()
            end = keys.end + n
            key_storage.filled = value_storage.filled = end
        total = logical + n
        start = keys.start
        if binding.window is not None and total > binding.window - 1:
            if not binding.skipped:
                start += total - binding.window + 1
            total = binding.window - 1
        results[binding.key_output] = longer = view(key_storage, start, end, total)
        results[binding.value_output] = view(value_storage, start, end, total)
        return longer, results[binding.value_output]

    def _settle(
        self, binding: AppendBinding, args: tuple[Any, ...], results: list[Any], keys: LogicalKV, values: LogicalKV
    ) -> None:
        assert keys.physical is not None and values.physical is not None
        fresh, logical = binding.tokens.of(args), keys.shape[2]
        mass = None if binding.mass_output is None else results[binding.mass_output]
        ids = None if binding.ids_output is None else results[binding.ids_output]
        queries = None if binding.queries_output is None else results[binding.queries_output]
        end = settle(keys, values, mass, fresh, binding.group, ids, queries)
        if end is not None:
            results[binding.key_output] = view(keys.physical, 0, end, logical)
            results[binding.value_output] = view(values.physical, 0, end, logical)

    def _sort(self, binding: AppendBinding, results: list[Any], keys: LogicalKV, values: LogicalKV) -> None:
        assert keys.physical is not None and values.physical is not None and binding.queries_output is not None
        left = sort_newest(keys, values, results[binding.queries_output], binding.scale)
        if left != keys.end:
            results[binding.key_output] = view(keys.physical, 0, left, keys.shape[2])
            results[binding.value_output] = view(values.physical, 0, left, keys.shape[2])

    def _store(
        self,
        binding: StoreBinding,
        args: tuple[Any, ...],
        results: list[Any],
        tables: dict[tuple[int, int], RotaryTable],
        kept: list[Tensor | None],
    ) -> Tensor | None:
        """Put a layer's prompt into storage; returns the tokens that stay, as ``kept`` has them of earlier stores."""
        positions = logical = None
        if binding.positions_output is not None and binding.tokens is not None:
            positions, logical = results[binding.positions_output][:, None], binding.tokens.of(args)
        outputs = binding.key_output, binding.value_output
        layouts = binding.key_layout, binding.value_layout
        keys, values = (results[output] for output in outputs)
        chosen: Tensor | None = None
        if binding.prompt is not None and layouts[0].mixing is not None:
            stored = store_mixed(layouts, binding.prompt, results, keys, values)
        elif binding.prompt is not None:
            if logical is None:
                logical = keys.shape[2]
            given = None if binding.follows is None else kept[binding.follows]
            *both, chosen = store_prompt(layouts, binding.prompt, results, keys, values, logical, positions, given)
            stored = both[0], both[1]
        else:
            table = None
            if binding.latents is not None:
                keys, values, table = with_latents(binding.latents, results, keys, values, tables)
            stored = (
                compress(layouts[0], keys, logical, positions if layouts[0].positions else None, table),
                compress(layouts[1], values, logical),
            )
        results[outputs[0]], results[outputs[1]] = stored
        return chosen


def prefixes(keys: Storage, values: Storage, inputs: list[Any]) -> tuple[int, ...]:
    """Append the buffers of what the rows share to ``inputs``; returns the lens of each prefix, one after another."""
    lengths: list[int] = []
    for key, value in zip(keys.prefixes, values.prefixes, strict=True):
        if key.tokens != value.tokens or key.entries != value.entries:
            raise SharedPrefixError(
                f"asked to attend to keys that share prefixes of {key.tokens} tokens and values that share prefixes of "
                f"{value.tokens}; select and crop the keys and the values of a cache alike, or pass the model "
                "torchaccel.to_dense(cache)"
            )
        inputs += [key.storage.buf, value.storage.buf]
        lengths += [0, key.tokens, key.tokens]
    return tuple(lengths)


def classes(keys: Storage, values: Storage, logical: int, inputs: list[Any]) -> tuple[int, ...]:
    """Append the buffers of the classes of tokens to ``inputs``; returns the lens of each class, one after another."""
    lengths: list[int] = []
    for key, value in zip(keys.classes, values.classes, strict=True):
        inputs += [key.buf, value.buf, key.positions]
        lengths += [0, key.filled, logical]
    inputs.append(values.scale)
    return tuple(lengths)


def with_latents(
    binding: LatentBinding,
    results: list[Any],
    keys: Tensor,
    values: Tensor,
    tables: dict[tuple[int, int], RotaryTable],
) -> tuple[Tensor, Tensor, RotaryTable | None]:
    """A prompt's keys and values with their latents behind them, and the rotary table, which layers share."""
    if binding.keys_output is not None:
        keys = torch.cat([keys, results[binding.keys_output]], -1)
    if binding.values_output is not None:
        values = torch.cat([values, results[binding.values_output]], -1)
    outputs = binding.table_outputs
    if outputs is None:
        return keys, values, None
    if outputs not in tables:
        tables[outputs] = rotary_table(results[outputs[0]], results[outputs[1]], keys.shape[0])
    return keys, values, tables[outputs]


def plain(argument: Any) -> Any:
    """The argument as the compiled graph takes it: logical KV tensors that no kernel reads are read back."""
    return argument.dense().contiguous() if isinstance(argument, LogicalKV) else argument


def adopt(tokens: Any, layout: Layout) -> LogicalKV:
    """A logical KV tensor for a plain cache tensor ``[B, H, S, D]`` made elsewhere (one copy)."""
    return tokens if isinstance(tokens, LogicalKV) else compress(layout, tokens)


def writable_pair(keys: LogicalKV, values: LogicalKV, room: int) -> tuple[LogicalKV, LogicalKV]:
    """Keys and values with room for ``room`` tokens, copied together or not at all so that their slots agree."""
    new_keys, new_values = writable(keys, room), writable(values, room)
    if (new_keys is keys) != (new_values is values):
        new_keys, new_values = writable(keys, room, copy=True), writable(values, room, copy=True)
    return new_keys, new_values
