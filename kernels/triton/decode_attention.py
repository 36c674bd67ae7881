"""Decode attention in Triton: append the new tokens and attend over the cache in one launch (two when split)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import kv_format
from ..spec import AttentionSpec
from .source import load, padded, render
from .tiles import PRECISION, DecodeConfig, decode_config, device_facts, max_rows, split_count
from .units import buffer_strides, mask_strides, rows_in_units, stride_unit

MAX_NEW_TOKENS = 16
# Tokens of an int8 block.
BLOCK = 64


def supports(spec: AttentionSpec, new_tokens: int = 1) -> str | None:
    """Why one launch cannot realise ``spec`` for ``new_tokens`` tokens, or None when it can."""
    keys, values = spec.key_format, spec.value_format
    if spec.phase != "decode":
        return f"decode kernels realise the phase 'decode', not {spec.phase!r}"
    if not 1 <= new_tokens <= MAX_NEW_TOKENS:
        return f"one launch appends 1 to {MAX_NEW_TOKENS} tokens, not {new_tokens}"
    if not 1 <= spec.head_dim <= 256:
        return f"head dimensions up to 256, not {spec.head_dim}"
    for name, fmt in (("key", keys), ("value", values)):
        if fmt.kind == "empty":
            return f"an empty {name} format holds nothing to attend to"
        if (fmt.dtype, fmt.head_dim) != (spec.dtype, spec.head_dim):
            return f"the {name} format must have the dtype and head dimension of the queries"
        if fmt.kind == "int8" and fmt.block != BLOCK:
            return f"int8 blocks of {BLOCK} tokens, not {fmt.block}"
    if keys.kind == "int8" and keys.axis != "channel":
        return "int8 keys with one scale per channel, not per token"
    if values.kind == "int8" and values.axis != "token":
        return "int8 values with one scale per token, not per channel"
    if padded(spec.group * new_tokens) > max_rows(spec):
        return (
            f"one program holds {max_rows(spec)} query rows of a KV head at head dimension {spec.head_dim}; "
            f"group x new tokens is {spec.group * new_tokens}"
        )
    if spec.softcap is not None and spec.softcap <= 0:
        return f"softcap must be positive, found {spec.softcap}"
    if spec.window is not None and spec.window < 1:
        return f"window must be at least 1, found {spec.window}"
    return None


def parameters(spec: AttentionSpec, append: bool) -> list[str]:
    """Run-time parameters of the generated ``attend``, in order."""
    names = ["q", "k_buf", "v_buf", "dst", "start", "end", "logical", "q_b", "q_h", "q_t", "k_b", "k_h", "v_b", "v_h"]
    if append:
        names += ["k_new", "v_new", "kn_b", "kn_h", "kn_t", "vn_b", "vn_h", "vn_t"]
    if spec.mask != "none":
        names += ["mask", "mask_b", "mask_h", "mask_q", "mask_c"]
        if spec.sinks and spec.window is not None:
            names += ["mask_columns"]
    if spec.positions:
        names += ["positions", "positions_b"]
    return names


def completion_parameters(spec: AttentionSpec) -> list[str]:
    """Run-time parameters of the generated ``complete_block``, in order."""
    names = ["k_buf", "v_buf", "end", "logical", "k_b", "k_h", "v_b", "v_h"]
    names += ["k_new", "v_new", "kn_b", "kn_h", "kn_t", "vn_b", "vn_h", "vn_t"]
    return names + (["positions", "positions_b"] if spec.positions else [])


def has_blocks(spec: AttentionSpec) -> bool:
    """Whether the keys or the values are stored as int8 blocks with a full-precision tail."""
    return "int8" in (spec.key_format.kind, spec.value_format.kind)


@lru_cache(maxsize=512)
def generate(spec: AttentionSpec, append: bool = True) -> str:
    """Triton source of ``spec``: kernels ``attend`` and ``merge``, and ``complete_block`` for int8 formats.

    ``append`` False generates the variant for buffers that already hold the new tokens (static caches, and int8 caches
    whose tail has just become a block): it writes nothing to them and skips tiles that a bool mask hides wholly.
    """
    tensors = {"q", "k_buf", "v_buf", "dst", "k_new", "v_new", "mask", "positions"}
    keys, values = spec.key_format, spec.value_format

    def scalars(names: list[str]) -> str:
        # mask_c is nearly always 1 and never changes with the length: it may be specialised.
        return ", ".join(f'"{name}"' for name in names if name not in tensors and name != "mask_c")

    return render(
        "decode_attention.py.jinja",
        spec,
        append=append,
        parameters=parameters(spec, append),
        scalars=scalars(parameters(spec, append)),
        completion_parameters=completion_parameters(spec),
        completion_scalars=scalars(completion_parameters(spec)),
        positions=spec.positions,
        key_int8=keys.kind == "int8",
        value_int8=values.kind == "int8",
        blocks=has_blocks(spec),
        k_tail=keys.tail_bytes,
        k_block=keys.block_bytes,
        v_tail=values.tail_bytes,
        v_block=values.block_bytes,
        k_unit=stride_unit(keys),
        v_unit=stride_unit(values),
        ranges=spec.window is not None and not spec.positions,
        skips_masked=spec.mask == "bool" and not append,
    )


@dataclass(frozen=True)
class _Plan:
    """What every call with the same number of new tokens on the same device shares."""

    module: ModuleType
    config: DecodeConfig
    rows: int
    processors: int
    precision: str


class DecodeAttention:
    """A decode attention kernel, called like the reference without its spec.

    Raises ValueError for a spec that ``supports`` declines.
    """

    def __init__(self, spec: AttentionSpec, config: DecodeConfig | None = None) -> None:
        if reason := supports(spec):
            raise ValueError(f"no Triton decode attention for this spec: {reason}")
        self.spec = spec
        self.config = config
        self._blocks = has_blocks(spec)
        self._has_first_column = bool(spec.sinks) and spec.window is not None
        self._plans: dict[tuple[bool, int, torch.device], _Plan] = {}

    def _plan(self, append: bool, n: int, device: torch.device) -> _Plan:
        spec = self.spec
        family, processors = device_facts(device)
        rows = padded(spec.group * n)
        config = self.config or decode_config(spec, family, rows)
        module = load(generate(spec, append), "decode_attention")
        plan = _Plan(module, config, rows, processors, PRECISION[family])
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
    ) -> Tensor:
        """Append ``k_new`` and ``v_new`` in place, then attend over everything stored.

        q: ``[B, H, Q, D]``; a Q that ``supports`` declines takes several launches. k_new, v_new: ``[B, H_kv, Q, D]``,
        or both None: the buffers already hold the tokens in slots ``start .. end`` (a static cache) and stay as they
        are. k_buf, v_buf: buffers of the spec's formats, slots contiguous. lens: int64 ``[3]`` on the CPU: first live
        slot, end of the filled slots, logical length, before the append. mask: ``[B | 1, H | 1, Q, columns]``, any
        strides. positions: int32 ``[B, C]``, updated in place.
        Returns ``[B, H, Q, D]``, contiguous, in q's dtype; rows that see no key are zero.
        """
        spec = self.spec
        batch, heads, n, d = q.shape
        if (mask is None) != (spec.mask == "none") or (positions is None) == spec.positions:
            raise ValueError(f"mask and positions must be given exactly when the spec names them: {spec.key()}")
        append = k_new is not None
        plan = self._plans.get((append, n, q.device))
        if plan is None:
            if supports(spec, n):
                return self._in_parts(q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
            plan = self._plan(append, n, q.device)
        start, end, logical = lens.tolist()
        kv_heads = heads // spec.group
        buffers = buffer_strides(spec.key_format, k_buf)
        buffers += buffer_strides(spec.value_format, v_buf)
        stored = [] if positions is None else [positions, positions.stride(0)]
        fresh: list[Any] = []
        if k_new is not None and v_new is not None:
            k_new, *k_strides = rows_in_units(k_new, d)
            v_new, *v_strides = rows_in_units(v_new, d)
            fresh = [k_new, v_new, *k_strides, *v_strides]

        with torch.cuda.device_of(q):
            if append and self._blocks and end % BLOCK + n >= BLOCK:
                # Once in 64 tokens: quantising needs registers that the other steps should not pay for.
                completion = [k_buf, v_buf, end, logical, *buffers, *fresh, *stored]
                plan.module.complete_block[(kv_heads, batch)](*completion, Q=n, BN=BLOCK, num_warps=8)
                append, end, fresh = False, end + n, []
                plan = self._plans.get((append, n, q.device)) or self._plan(append, n, q.device)
            config = plan.config
            splits = config.splits
            if splits is None:
                tokens = end - start
                if spec.window is not None and positions is None:
                    tokens = min(tokens, spec.window + spec.sinks)
                splits = split_count(tokens, config.block_n, batch * kv_heads, plan.processors)
            q, *q_strides = rows_in_units(q, d)
            out = q.new_empty(batch, heads, n, d)
            rows = batch * heads * n
            dst = out if splits == 1 else q.new_empty(splits * rows * (d + 2), dtype=torch.float32)
            masks, constants = self._mask_arguments(mask)
            args = [q, k_buf, v_buf, dst, start, end, logical, *q_strides, *buffers, *fresh, *masks, *stored]
            plan.module.attend[(splits, kv_heads, batch)](
                *args,
                Q=n,
                BM=plan.rows,
                BN=config.block_n,
                NEW=padded(n),
                SPLIT=splits > 1,
                PRECISION=plan.precision,
                num_warps=config.warps,
                num_stages=config.stages,
                **constants,
            )
            if splits > 1:
                plan.module.merge[(rows,)](dst, out, splits, num_warps=4)
        return out

    def _in_parts(
        self,
        q: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        k_buf: Tensor,
        v_buf: Tensor,
        lens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """The call in parts of as many new tokens as one program holds, after an append by stock operators."""
        start, end, logical = lens.tolist()
        n = q.shape[2]
        if k_new is not None and v_new is not None:
            kv_format.append(self.spec.key_format, k_buf, end, k_new)
            kv_format.append(self.spec.value_format, v_buf, end, v_new)
            if positions is not None:
                positions[:, end : end + n] = torch.arange(logical, logical + n, device=positions.device)
            end += n
        size = min(MAX_NEW_TOKENS, max_rows(self.spec) // self.spec.group)
        parts = []
        for first in range(0, n, size):
            rows = slice(first, min(first + size, n))
            part_mask = None if mask is None else mask[:, :, rows]
            part_lens = torch.tensor([start, end, logical + first])
            parts.append(self(q[:, :, rows], None, None, k_buf, v_buf, part_lens, part_mask, positions))
        return torch.cat(parts, 2)

    def _mask_arguments(self, mask: Tensor | None) -> tuple[list[Any], dict[str, Any]]:
        """Run-time arguments and constants of a mask."""
        if mask is None:
            return [], {}
        _, heads, n, columns = mask.shape
        arguments: list[Any] = [mask, *mask_strides(mask)]
        constants: dict[str, Any] = {"MASK_ROWS": n > 1 or heads > 1}
        if self._has_first_column:
            arguments.append(columns)
            if self.spec.mask == "additive":
                constants["MASK_FLOOR"] = torch.finfo(mask.dtype).min / 2
        return arguments, constants


@lru_cache(maxsize=512)
def decode_attention(spec: AttentionSpec, config: DecodeConfig | None = None) -> DecodeAttention:
    """The decode attention kernel of ``spec``; ``config`` overrides the launch choices of the tables."""
    return DecodeAttention(spec, config)
