"""Decode attention in Triton: append the new tokens and attend over the cache in one launch (two when split)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import kv_format, rotary
from ..spec import DTYPES, AttentionSpec, KVFormat
from .decode_source import (
    blocked_format,
    completion_parameters,
    generate,
    parameters,
    skips_window,
    weigh_parameters,
    widest_tile,
)
from .decode_support import MAX_NEW_TOKENS, supports
from .source import load, padded
from .tiles import (
    PRECISION,
    DecodeConfig,
    completion_warps,
    decode_config,
    device_facts,
    max_rows,
    split_count,
    stream_tiles,
)
from .units import buffer_strides, mask_strides, rows_in_units


def configs(spec: AttentionSpec) -> tuple[tuple[tuple[str, int | str], ...], ...]:
    """The launch choices worth a try, the tables' own first: one step from it in each direction, each way to split."""
    seed = _seed(spec)
    found = [seed, replace(seed, split="stream"), replace(seed, split="single")]
    widest = widest_tile(spec) or 128
    for block_n in (seed.block_n // 2, seed.block_n * 2):
        if 16 <= block_n <= widest:
            found.append(replace(seed, block_n=block_n))
    found += [replace(seed, warps=warps) for warps in (2, 4, 8) if warps != seed.warps]
    found += [replace(seed, stages=stages) for stages in (1, 2, 3, 4) if abs(stages - seed.stages) == 1]
    return tuple((("block_n", c.block_n), ("split", c.split), ("stages", c.stages), ("warps", c.warps)) for c in found)


def _seed(spec: AttentionSpec) -> DecodeConfig:
    family, _ = device_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = decode_config(spec, family, padded(spec.group))
    return replace(config, block_n=min(config.block_n, widest_tile(spec) or config.block_n))


@dataclass(frozen=True)
class _Plan:
    """What every call with the same number of new tokens on the same device shares."""

    module: ModuleType
    names: list[str]
    config: DecodeConfig
    rows: int
    processors: int
    precision: str


class DecodeAttention:
    """A decode attention kernel, called like the reference without its spec.

    choices: fields of ``DecodeConfig`` that replace those of the tables.
    Raises ValueError for a spec that ``supports`` declines, and for choices that do not fit it.
    """

    def __init__(self, spec: AttentionSpec, **choices: Any) -> None:
        if reason := supports(spec):
            raise ValueError(f"no Triton decode attention for this spec: {reason}")
        if unknown := set(choices) - {field.name for field in fields(DecodeConfig)}:
            raise ValueError(f"decode attention has no launch choice {', '.join(sorted(unknown))}")
        block_n, widest = choices.get("block_n", 16), widest_tile(spec)
        if block_n < 16 or block_n & (block_n - 1) or (widest is not None and block_n > widest):
            limit = f" up to {widest}" if widest else ""
            raise ValueError(f"block_n must be a power of two from 16 on{limit} for this spec, found {block_n}")
        self.spec = spec
        self.choices = choices
        self._blocked = blocked_format(spec)
        self._has_first_column = bool(spec.sinks) and spec.window is not None
        self._plans: dict[tuple[bool, int, torch.device], _Plan] = {}

    def _plan(self, append: bool, n: int, device: torch.device) -> _Plan:
        plan = self._plans.get((append, n, device))
        if plan is None:
            spec = self.spec
            family, processors = device_facts(device)
            rows = padded(spec.group * n)
            config = replace(decode_config(spec, family, rows), **self.choices)
            config = replace(config, block_n=min(config.block_n, widest_tile(spec) or config.block_n))
            stream = config.split == "stream"
            module = load(generate(spec, append, stream), "decode_attention")
            plan = _Plan(module, parameters(spec, append, stream), config, rows, processors, PRECISION[family])
            self._plans[append, n, device] = plan
        return plan

    def __call__(
        self,
        q: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        k_buf: Tensor,
        v_buf: Tensor,
        lens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        index: Tensor | None = None,
        head_windows: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        projection: Tensor | None = None,
        table: Tensor | None = None,
        value_projection: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Append ``k_new`` and ``v_new`` in place, then attend over everything stored, or what ``index`` lists.

        q: ``[B, H, Q, D]``; a Q that ``supports`` declines takes several launches. k_new, v_new: ``[B, H_kv, Q, D]``,
        or both None: the buffers already hold the tokens in slots ``start .. end`` (a static cache) and stay as they
        are. k_buf, v_buf: buffers of the spec's formats, slots contiguous. lens: int64 ``[3]`` on the CPU: first live
        slot, end of the filled slots, logical length, before the append. mask: ``[B | 1, H | 1, Q, columns]``, any
        strides. positions: int32 ``[B, 1 | H_kv, C]``, updated in place. index: int32 ``[B, H_kv, N]``.
        head_windows: int32 ``[H_kv]``. cos, sin: ``[B | 1, Q, rotary_dim]``, for specs that rotate q and k_new.
        projection, table: for latent keys, see ``latents.rebuild``; k_new is ``[B, H_kv, Q, D + rank]`` then.
        value_projection: None, latent values are not supported.
        Returns ``[B, H, Q, D]``, contiguous, in q's dtype (rows that see no key are zero), and behind it what the spec
        asks for: log-sum-exp, float32 ``[B, H, Q]``, and mass, float32 ``[B, H_kv, C]``.
        """
        spec = self.spec
        given = (mask is not None, positions is not None, index is not None, head_windows is not None)
        if given != (spec.mask != "none", spec.positions, spec.index != "contiguous", spec.head_windows):
            raise ValueError(
                f"mask, positions, index and head_windows must be given exactly when the spec names them: {spec.key()}"
            )
        start, end, logical = lens.tolist()
        n = q.shape[2]
        if spec.rotary != "none":
            cos, sin = _tables(*rotary.tables(spec, cos, sin, q.shape[0], n))
        rebuilding = _rebuilding(spec.key_format, projection, table, k_buf.shape[1])
        call = _Call(
            k_buf, v_buf, start, end, logical, end, mask, positions, index, head_windows, cos, sin, *rebuilding
        )
        if supports(spec, n):
            if spec.rotary != "none":
                q = rotary.rotated(spec, q, cos, sin)
                k_new = None if k_new is None else rotary.rotated(spec, k_new, cos, sin)
                plain = decode_attention(replace(spec, rotary="none", rotary_dim=0), **self.choices)
                seen = mask, positions, index, head_windows
                return plain(q, k_new, v_new, k_buf, v_buf, lens, *seen, projection=projection, table=table)
            return self._in_parts(q, self._stored(call, k_new, v_new))
        fresh: dict[str, Any] = {}
        if k_new is not None and v_new is not None:
            fmt = self._blocked
            # Once in a block: encoding, and what it takes, needs registers that the other steps should not pay for.
            completes = fmt is not None and fmt.quantised(end + n) > fmt.quantised(end)
            if completes:
                k_new = rotary.rotated(spec, k_new, cos, sin)
            warps = completion_warps(spec)
            if completes and warps is None:
                call = self._stored(call, k_new, v_new)
            else:
                fresh = self._fresh(k_new, v_new)
            if completes and warps is not None:
                with torch.cuda.device_of(q):
                    values = self._arguments(q, call, fresh)
                    plan = self._plan(True, n, q.device)
                    completion = [values[name] for name in completion_parameters(spec)]
                    plan.module.complete_block[(k_buf.shape[1], q.shape[0])](*completion, Q=n, num_warps=warps)
                call, fresh = replace(call, end=end + n), {}
        with torch.cuda.device_of(q):
            return self._attend(q, call, fresh)

    def _stored(self, call: _Call, k_new: Tensor | None, v_new: Tensor | None) -> _Call:
        """The call after stock operators have appended the new tokens, where there are any."""
        if k_new is None or v_new is None:
            return call
        spec, n = self.spec, k_new.shape[2]
        kv_format.append(spec.key_format, call.k_buf, call.end, k_new)
        kv_format.append(spec.value_format, call.v_buf, call.end, v_new)
        if call.positions is not None:
            columns = torch.arange(call.logical, call.logical + n, device=call.positions.device)
            call.positions[..., call.end : call.end + n] = columns
        return replace(call, end=call.end + n)

    def _fresh(self, k_new: Tensor, v_new: Tensor) -> dict[str, Any]:
        """The new tokens and their strides, by the name of the parameter."""
        k_new, *k_strides = rows_in_units(k_new, self.spec.key_format.width)
        v_new, *v_strides = rows_in_units(v_new, self.spec.head_dim)
        names = "kn_b", "kn_h", "kn_t", "vn_b", "vn_h", "vn_t"
        return {"k_new": k_new, "v_new": v_new, **dict(zip(names, (*k_strides, *v_strides), strict=True))}

    def _attend(self, q: Tensor, call: _Call, fresh: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        """Launch ``attend``, and what its split and the spec's side results need."""
        spec = self.spec
        batch, heads, n, d = q.shape
        units = batch * (heads // spec.group)
        plan = self._plan(bool(fresh), n, q.device)
        config, module = plan.config, plan.module
        tiles, recents = self._tiles(call, config.block_n, n if fresh else 0)
        values = self._arguments(q, call, fresh)
        constants: dict[str, Any] = {
            "Q": n,
            "BM": plan.rows,
            "BN": config.block_n,
            "PRECISION": plan.precision,
            "num_warps": config.warps,
            "num_stages": config.stages,
        } | self._call_constants(call)
        out = q.new_empty(batch, heads, n, d)
        results = [out]
        sides: list[Tensor] = []
        if spec.lse or spec.mass:
            sides = [q.new_empty(batch, heads, n, dtype=torch.float32)]
            values["lse"] = sides[0]
        values |= {"out": out, "part": out}
        if config.split == "stream":
            unit_tiles = max(1, tiles + recents)
            each = stream_tiles(units * unit_tiles, config.block_n, plan.processors)
            grid: tuple[int, ...] = (-(-units * unit_tiles // each),)
            slots, shared = 2 * grid[0], each % unit_tiles != 0
            division: tuple[int, ...] = (unit_tiles, each)
            values |= {"heads": heads // spec.group, "units": units, "unit_tiles": unit_tiles, "each": each}
        else:
            splits = 1
            if config.split == "kv":
                tokens = (tiles + recents) * config.block_n
                splits = config.splits or split_count(tokens, config.block_n, units, plan.processors)
            grid = (splits, heads // spec.group, batch)
            slots, shared, division = units * splits, splits > 1, (splits,)
            constants["SPLIT"] = shared
        if shared:
            values["part"] = q.new_empty(slots * spec.group * n * (d + 2), dtype=torch.float32)
        module.attend[grid](*(values[name] for name in plan.names), NEW=padded(n), **constants)
        if shared:
            rows = (batch * heads * n,)
            module.merge[rows](values["part"], out, *sides, slots, *division, ROWS=spec.group * n, num_warps=4)
        if spec.lse:
            results += sides
        if spec.mass:
            constants.pop("SPLIT", None)
            results.append(self._mass(q, replace(call, end=call.end + (n if fresh else 0)), sides[0], constants))
        return results[0] if len(results) == 1 else tuple(results)

    def _mass(self, q: Tensor, call: _Call, lse: Tensor, constants: dict[str, Any]) -> Tensor:
        """Probability that each slot got, float32 ``[B, H_kv, C]``: scores once more, now that their sums are known."""
        spec = self.spec
        batch, heads, n, _ = q.shape
        plan = self._plan(False, n, q.device)
        capacity = kv_format.capacity(spec.key_format, call.k_buf)
        mass = q.new_zeros(batch, heads // spec.group, capacity, dtype=torch.float32)
        values = self._arguments(q, call, {}) | {"lse": lse, "mass": mass, "capacity": capacity}
        tokens = sum(self._tiles(call, plan.config.block_n, 0)) * plan.config.block_n
        splits = split_count(tokens, plan.config.block_n, batch * heads // spec.group, plan.processors)
        arguments = [values[name] for name in weigh_parameters(spec)]
        plan.module.weigh[(splits, heads // spec.group, batch)](*arguments, **constants)
        return mass

    def _tiles(self, call: _Call, block_n: int, new: int) -> tuple[int, int]:
        """Tiles of the longest unit: those of the cache, and those of the tail of formats with blocks."""
        spec, fmt = self.spec, self._blocked
        stop = fmt.quantised(call.end) if fmt else call.end
        recents = _cdiv(call.end - stop + new, block_n) if fmt else 0
        every = max(_cdiv(stop, block_n) - call.start // block_n, 0)
        if call.index is not None:
            entries = call.index.shape[2]
            tiles = entries * (spec.index_block // block_n) if spec.index == "blocks" else _cdiv(entries, block_n)
            if not new and call.since < stop:
                tiles += _cdiv(stop, block_n) - call.since // block_n
            return tiles, recents
        if skips_window(spec) and not spec.head_windows:
            assert spec.window is not None
            low = max(call.start, call.start + call.logical - spec.window + 1) // block_n
            sinks = _cdiv(spec.sinks, block_n) + 1 if spec.sinks else 0
            return min(max(_cdiv(stop, block_n) - low, 0) + sinks, every), recents
        return every, recents

    def _arguments(self, q: Tensor, call: _Call, fresh: dict[str, Any]) -> dict[str, Any]:
        """Run-time arguments by the name of the parameter."""
        spec = self.spec
        q, *q_strides = rows_in_units(q, spec.head_dim)
        strides = (*q_strides, *buffer_strides(spec.key_format, call.k_buf))
        strides += tuple(buffer_strides(spec.value_format, call.v_buf))
        values: dict[str, Any] = {"q": q, "k_buf": call.k_buf, "v_buf": call.v_buf, **fresh}
        values |= zip(("q_b", "q_h", "q_t", "k_b", "k_h", "v_b", "v_h"), strides, strict=True)
        values |= {"start": call.start, "end": call.end, "logical": call.logical, "since": call.since}
        if call.mask is not None:
            values["mask"] = call.mask
            values |= zip(("mask_b", "mask_h", "mask_q", "mask_c"), mask_strides(call.mask), strict=True)
            values["mask_columns"] = call.mask.shape[3]
        if call.positions is not None:
            heads = call.positions.stride(1) if call.positions.shape[1] > 1 else 0
            values |= {"positions": call.positions, "positions_b": call.positions.stride(0), "positions_h": heads}
        if call.index is not None:
            index = call.index if call.index.stride(2) == 1 else call.index.contiguous()
            values |= {"index": index, "index_b": index.stride(0), "index_h": index.stride(1)}
            values["entries"] = index.shape[2]
        values["head_windows"] = call.head_windows
        if call.cos is not None:
            steps = call.cos.stride(0) if call.cos.shape[0] > 1 else 0, call.cos.stride(1)
            values |= {"cos": call.cos, "sin": call.sin, "table_b": steps[0], "table_t": steps[1]}
        if call.table is not None:
            values |= {"projection": call.projection, "angles": call.table, "angles_s": call.table.stride(0)}
            values["angles_b"] = call.table.stride(1) if call.table.shape[1] > 1 else 0
        return values

    def _in_parts(self, q: Tensor, call: _Call) -> Tensor | tuple[Tensor, ...]:
        """Attention over what is stored, in parts of as many queries as one program holds."""
        parts = []
        size = min(MAX_NEW_TOKENS, max_rows(self.spec) // self.spec.group)
        with torch.cuda.device_of(q):
            for rows, part in _slices(call, q.shape[2], size):
                got = self._attend(q[:, :, rows], part, {})
                parts.append(got if isinstance(got, tuple) else (got,))
        columns = list(zip(*parts, strict=True))
        mass = [torch.stack(columns.pop()).sum(0)] if self.spec.mass else []
        results = [torch.cat(column, 2) for column in columns] + mass
        return results[0] if len(results) == 1 else tuple(results)

    def _call_constants(self, call: _Call) -> dict[str, Any]:
        """What a kernel is compiled for of a mask, and of the table that turns rebuilt keys."""
        constants: dict[str, Any] = {}
        if call.mask is not None:
            constants["MASK_ROWS"] = call.mask.shape[2] > 1 or call.mask.shape[1] > 1
            if self._has_first_column and self.spec.mask == "additive":
                constants["MASK_FLOOR"] = torch.finfo(call.mask.dtype).min / 2
        if call.table is not None:
            constants |= turned_parts(call.table.shape[3], self.spec.head_dim)
        return constants


@dataclass(frozen=True)
class _Call:
    """The arguments of a call that its launches share; slots from ``since`` on are new."""

    k_buf: Tensor
    v_buf: Tensor
    start: int
    end: int
    logical: int
    since: int
    mask: Tensor | None
    positions: Tensor | None
    index: Tensor | None
    head_windows: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    projection: Tensor | None
    table: Tensor | None


def turned_parts(turned: int, head_dim: int) -> dict[str, int]:
    """The parts in which keys are rebuilt, padded, 0 for none; the rotary embedding turns ``turned`` channels."""
    rest = head_dim - turned
    return {"TURNED": turned, "HALF": padded(turned // 2) if turned else 0, "REST": padded(rest) if rest else 0}


def _rebuilding(
    fmt: KVFormat, projection: Tensor | None, table: Tensor | None, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """What latent keys are rebuilt with, as the kernel reads it; nothing for other keys."""
    if fmt.kind != "latent":
        return None, None
    shape = heads, heads * fmt.rank, fmt.head_dim
    if projection is None or tuple(projection.shape) != shape:
        found = "none" if projection is None else list(projection.shape)
        raise ValueError(f"latent keys need a projection {list(shape)}; found {found}")
    angles = projection.new_empty(2, 1, 0, 0) if table is None else table
    return projection.to(DTYPES[fmt.dtype]).contiguous(), angles.float().contiguous()


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of equal strides, the last one 1."""
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        return cos.contiguous(), sin.contiguous()
    return cos, sin


def _slices(call: _Call, n: int, size: int) -> Iterator[tuple[slice, _Call]]:
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        mask = None if call.mask is None else call.mask[:, :, rows]
        yield rows, replace(call, logical=call.logical + first, mask=mask)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=1024)
def decode_attention(spec: AttentionSpec, **choices: Any) -> DecodeAttention:
    """The decode attention kernel of ``spec``; ``choices`` (``DecodeConfig``'s fields) override those of the tables."""
    return DecodeAttention(spec, **choices)
