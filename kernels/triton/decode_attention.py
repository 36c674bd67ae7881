"""Decode attention in Triton: append the new tokens and attend over the cache in one launch (two when split)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..spec import AttentionSpec, KVFormat
from .source import load, padded, render
from .tiles import DecodeConfig, decode_config, device_facts, split_count

MAX_NEW_TOKENS = 16
MAX_ROWS = 128


def supports(spec: AttentionSpec, new_tokens: int = 1) -> str | None:
    """Why these kernels cannot realise ``spec`` for calls of ``new_tokens`` tokens, or None when they can."""
    keys, values = spec.key_format, spec.value_format
    if spec.phase != "decode":
        return f"decode kernels realise the phase 'decode', not {spec.phase!r}"
    if not 1 <= new_tokens <= MAX_NEW_TOKENS:
        return f"one call appends 1 to {MAX_NEW_TOKENS} tokens, not {new_tokens}"
    if spec.group * new_tokens > MAX_ROWS:
        return f"one program holds {MAX_ROWS} query rows of a KV head; group x new tokens is {spec.group * new_tokens}"
    if not 1 <= spec.head_dim <= 256:
        return f"head dimensions up to 256, not {spec.head_dim}"
    for name, fmt in (("key", keys), ("value", values)):
        if fmt.kind == "empty":
            return f"an empty {name} format holds nothing to attend to"
        if (fmt.dtype, fmt.head_dim) != (spec.dtype, spec.head_dim):
            return f"the {name} format must have the dtype and head dimension of the queries"
        if fmt.kind == "int8" and fmt.block != 64:
            return f"int8 blocks of 64 tokens, not {fmt.block}"
    if keys.kind == "int8" and keys.axis != "channel":
        return "int8 keys with one scale per channel, not per token"
    if values.kind == "int8" and values.axis != "token":
        return "int8 values with one scale per token, not per channel"
    if spec.softcap is not None and spec.softcap <= 0:
        return f"softcap must be positive, found {spec.softcap}"
    if spec.window is not None and spec.window < 1:
        return f"window must be at least 1, found {spec.window}"
    return None


def stride_unit(fmt: KVFormat) -> int:
    """Elements by which strides of a buffer are counted: their divisibility is then known without specialisation."""
    return gcd(fmt.tail_bytes, fmt.block_bytes) if fmt.kind == "int8" else fmt.head_dim


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


@lru_cache(maxsize=512)
def generate(spec: AttentionSpec, append: bool = True) -> str:
    """Triton source of ``spec``: kernels ``attend`` and ``merge``.

    ``append`` False generates the variant for caches that the caller has already updated (static caches): it writes
    nothing to the buffers and skips tiles that a bool mask hides wholly.
    """
    names = parameters(spec, append)
    tensors = {"q", "k_buf", "v_buf", "dst", "k_new", "v_new", "mask", "positions"}
    keys, values = spec.key_format, spec.value_format
    # mask_c is nearly always 1 and never changes with the length: it may be specialised.
    scalars = ", ".join(f'"{name}"' for name in names if name not in tensors and name != "mask_c")
    return render(
        "decode_attention.py.jinja",
        spec,
        append=append,
        parameters=names,
        scalars=scalars,
        positions=spec.positions,
        key_int8=keys.kind == "int8",
        value_int8=values.kind == "int8",
        blocks="int8" in (keys.kind, values.kind),
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

    attend: Any
    merge: Any
    config: DecodeConfig
    rows: int
    processors: int


class DecodeAttention:
    """A decode attention kernel, called like the reference without its spec.

    Raises ValueError for a spec or a call that ``supports`` declines.
    """

    def __init__(self, spec: AttentionSpec, config: DecodeConfig | None = None) -> None:
        if reason := supports(spec):
            raise ValueError(f"no Triton decode attention for this spec: {reason}")
        self.spec = spec
        self.config = config
        self._units = stride_unit(spec.key_format), stride_unit(spec.value_format)
        self._plans: dict[tuple[bool, int, torch.device], _Plan] = {}

    def _plan(self, append: bool, n: int, device: torch.device) -> _Plan:
        spec = self.spec
        if reason := supports(spec, n):
            raise ValueError(f"no Triton decode attention for this call: {reason}")
        module = load(generate(spec, append), "decode_attention")
        family, processors = device_facts(device)
        rows = padded(spec.group * n)
        int8 = "int8" in (spec.key_format.kind, spec.value_format.kind)
        config = self.config or decode_config(family, spec.head_dim, rows, int8, spec.dtype)
        plan = _Plan(module.attend, module.merge, config, rows, processors)
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

        q: ``[B, H, Q, D]``, Q up to 16. k_new, v_new: ``[B, H_kv, Q, D]``, or both None: the buffers already hold the
        tokens in slots ``start .. end`` (a static cache) and stay as they are. k_buf, v_buf: buffers of the spec's
        formats, slots contiguous. lens: int64 ``[3]`` on the CPU: first live slot, end of the filled slots, logical
        length, before the append. mask: ``[B | 1, H | 1, Q, columns]``. positions: int32 ``[B, C]``, updated in place.
        Returns ``[B, H, Q, D]``, contiguous, in q's dtype; rows that see no key are zero.
        """
        spec = self.spec
        batch, heads, n, d = q.shape
        if (mask is None) != (spec.mask == "none") or (positions is None) == spec.positions:
            raise ValueError(f"mask and positions must be given exactly when the spec names them: {spec.key()}")
        append = k_new is not None
        plan = self._plans.get((append, n, q.device)) or self._plan(append, n, q.device)
        start, end, logical = lens.tolist()
        config = plan.config
        kv_heads = heads // spec.group
        splits = config.splits
        if splits is None:
            tokens = end - start if spec.window is None else min(end - start, spec.window + spec.sinks)
            splits = split_count(tokens, config.block_n, batch * kv_heads, plan.processors)

        q, *q_strides = _rows(q, d)
        out = q.new_empty(batch, heads, n, d)
        rows = batch * heads * n
        dst = out if splits == 1 else q.new_empty(splits * rows * (d + 2), dtype=torch.float32)
        args = [q, k_buf, v_buf, dst, start, end, logical, *q_strides]
        args += _buffer_strides(spec.key_format, k_buf, self._units[0])
        args += _buffer_strides(spec.value_format, v_buf, self._units[1])
        if k_new is not None and v_new is not None:
            k_new, *k_strides = _rows(k_new, d)
            v_new, *v_strides = _rows(v_new, d)
            args += [k_new, v_new, *k_strides, *v_strides]
        constants: dict[str, Any] = {}
        if mask is not None:
            b, h, _, columns = mask.shape
            strides = mask.stride()
            args += [mask, strides[0] if b > 1 else 0, strides[1] if h > 1 else 0, *strides[2:]]
            constants["MASK_ROWS"] = n > 1 or h > 1
            if spec.sinks and spec.window is not None:
                args.append(columns)
                if spec.mask == "additive":
                    constants["MASK_FLOOR"] = torch.finfo(mask.dtype).min / 2
        if positions is not None:
            args += [positions, positions.stride(0)]
        with torch.cuda.device_of(q):
            plan.attend[(splits, kv_heads, batch)](
                *args,
                Q=n,
                BM=plan.rows,
                BN=config.block_n,
                NEW=padded(n),
                SPLIT=splits > 1,
                num_warps=config.warps,
                num_stages=config.stages,
                **constants,
            )
            if splits > 1:
                plan.merge[(rows,)](dst, out, splits, num_warps=4)
        return out


def _rows(x: Tensor, d: int) -> tuple[Tensor, int, int, int]:
    """``x`` ``[B, H, n, D]`` with its first three strides in units of D, copied only when they are not whole."""
    b, h, t, one = x.stride()
    if one != 1 or b % d or h % d or t % d:
        x = x.contiguous()
        b, h, t, _ = x.stride()
    return x, b // d, h // d, t // d


def _buffer_strides(fmt: KVFormat, buf: Tensor, unit: int) -> list[int]:
    """Batch and head strides of a cache buffer in units of ``unit``; ValueError when slots do not lie side by side."""
    strides = buf.stride()
    if strides[-1] != 1 or strides[0] % unit or strides[1] % unit or (fmt.kind == "dense" and strides[2] != fmt.head_dim):
        raise ValueError(f"slots of a cache buffer must be contiguous, found strides {strides} for {fmt}")
    return [strides[0] // unit, strides[1] // unit]


@lru_cache(maxsize=512)
def decode_attention(spec: AttentionSpec, config: DecodeConfig | None = None) -> DecodeAttention:
    """The decode attention kernel of ``spec``; ``config`` overrides the launch choices of the tables."""
    return DecodeAttention(spec, config)
