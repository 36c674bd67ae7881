"""Generated C++ for decode attention: append to a KV buffer, then attend over everything stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..spec import DTYPES, AttentionSpec, KVFormat
from .compile import compile_source, missing_toolchain, render

Decode = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    Tensor,
]

C_TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}
MASK_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
MAX_HEAD_DIM = 256
MAX_GROUP = 64
DENSE_TILE = 64
# Waking a second thread costs a few microseconds, about the time one core needs for these many tiles of 64 keys.
MIN_TILES = 8

FIELDS = (
    "q, q_b, q_h, q_q, q_d",
    "k_new, kn_b, kn_h, kn_q, kn_d",
    "v_new, vn_b, vn_h, vn_q, vn_d",
    "k, k_b, k_h, k_t",
    "v, v_b, v_h, v_t",
    "mask, mask_b, mask_h, mask_q, mask_c, mask_b_size, mask_h_size, columns, mask_kind",
    "positions, positions_b",
    "out, lens, B, HKV, Q, capacity",
)


def supports(spec: AttentionSpec) -> str | None:
    """Why no C++ decode kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.phase != "decode":
        return f"this kernel serves phase 'decode'; the spec is of phase '{spec.phase}'"
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.group <= MAX_GROUP:
        return f"the C++ kernel handles 1 to {MAX_GROUP} query heads per KV head; found {spec.group}"
    for name, fmt in (("key", spec.key_format), ("value", spec.value_format)):
        reason = _unsupported_format(name, fmt)
        if reason:
            return reason
    key, value = spec.key_format, spec.value_format
    if key.kind == value.kind == "int8" and key.block != value.block:
        return f"keys and values need equal int8 blocks; found {key.block} and {value.block}"
    return missing_toolchain()


def _unsupported_format(name: str, fmt: KVFormat) -> str | None:
    if fmt.kind == "empty":
        return f"the {name}s are not stored (format 'empty'), so nothing can be attended to"
    if not 1 <= fmt.head_dim <= MAX_HEAD_DIM:
        return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {fmt.head_dim} ({name}s)"
    if fmt.kind == "int8":
        axis = "channel" if name == "key" else "token"
        if fmt.axis != axis:
            return f"int8 {name}s need one scale per {axis}; found one per {fmt.axis}"
        if fmt.block % 16 or not 16 <= fmt.block <= 256:
            return f"int8 blocks must hold a multiple of 16 tokens, at most 256; found {fmt.block} ({name}s)"
    return None


def source(spec: AttentionSpec) -> str:
    """The C++ source of the decode kernel of ``spec``; equal specs give equal text."""
    key, value = spec.key_format, spec.value_format
    tile = next((fmt.block for fmt in (key, value) if fmt.kind == "int8"), DENSE_TILE)
    return render(
        "attention.cpp.jinja",
        title="torchaccel decode attention",
        spec=spec.key(),
        fields=FIELDS,
        q_type=C_TYPES[spec.dtype],
        k_type=C_TYPES[key.dtype],
        v_type=C_TYPES[value.dtype],
        dk=key.head_dim,
        dv=value.head_dim,
        group=spec.group,
        k_int8=_bool(key.kind == "int8"),
        v_int8=_bool(value.kind == "int8"),
        tile=tile,
        min_tiles=MIN_TILES,
        **modifiers(spec),
    )


def modifiers(spec: AttentionSpec) -> dict[str, object]:
    """The symbols of modifiers.cpp.jinja: how scores are changed and which keys are seen."""
    return {
        "scale": float(spec.scale),
        "softcap": None if spec.softcap is None else float(spec.softcap),
        "causal": _bool(spec.causal),
        "windowed": _bool(spec.window is not None),
        "window": spec.window or 0,
        "sinks": spec.sinks,
        "positions": _bool(spec.positions),
        "bool_mask": _bool(spec.mask == "bool"),
        "additive_mask": _bool(spec.mask == "additive"),
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"


@lru_cache(maxsize=1024)
def decode_attention(spec: AttentionSpec) -> Decode:
    """The compiled kernel of ``spec``: ``reference.decode_attention`` without its first argument.

    ``call(q, k_new, v_new, k_buf, v_buf, lens, mask, positions) -> out``, shapes as in the reference. q, k_new, v_new
    and the mask may have any strides; the buffers need a contiguous last dimension. With k_new and v_new None nothing
    is appended and slots ``lens[0] .. lens[1]`` are attended. The result is contiguous. Raises ``ValueError`` for a
    spec that ``supports`` refuses; the returned function raises ``RuntimeError`` when the buffer is full.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(spec))
    key, value = spec.key_format, spec.value_format
    k_dtype, v_dtype, dtype = DTYPES[key.dtype], DTYPES[value.dtype], DTYPES[spec.dtype]
    k_int8, v_int8 = key.kind == "int8", value.kind == "int8"
    group, head_dim = spec.group, value.head_dim
    masked = spec.mask != "none"
    empty = torch.empty

    def call(
        q: Tensor,
        k_new: Tensor | None,
        v_new: Tensor | None,
        k_buf: Tensor,
        v_buf: Tensor,
        lens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        batch, heads, n, _ = q.shape
        out = empty((batch, heads, n, head_dim), dtype=dtype)
        if q.dtype != dtype:
            q = q.to(dtype)
        k_args: tuple[int, ...] = (0, 0, 0, 0, 0)
        v_args = k_args
        if k_new is not None and v_new is not None:
            if k_new.dtype != k_dtype:
                k_new = k_new.to(k_dtype)
            if v_new.dtype != v_dtype:
                v_new = v_new.to(v_dtype)
            k_args = (k_new.data_ptr(), *k_new.stride())
            v_args = (v_new.data_ptr(), *v_new.stride())
        if k_int8:
            k_b, k_h, unit = k_buf.stride()
            k_t = 0
            capacity = (k_buf.shape[2] - key.tail_bytes) // key.block_bytes * key.block
        else:
            k_b, k_h, k_t, unit = k_buf.stride()
            capacity = k_buf.shape[2]
        if v_int8:
            v_b, v_h, last = v_buf.stride()
            v_t = 0
        else:
            v_b, v_h, v_t, last = v_buf.stride()
        if (unit != 1 or last != 1) and k_buf.numel():
            raise ValueError(f"KV buffers need a contiguous last dimension; found strides {k_buf.stride()}")
        mask_args: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0, 3)
        if masked:
            if mask is None:
                raise ValueError(f"the kernel was generated for a mask ({spec.mask}); found none")
            if mask.dtype not in MASK_KINDS:
                mask = mask.float()
            mask_args = (mask.data_ptr(), *mask.stride(), *mask.shape[:2], mask.shape[3], MASK_KINDS[mask.dtype])
        kernel(
            q.data_ptr(), *q.stride(), *k_args, *v_args,
            k_buf.data_ptr(), k_b, k_h, k_t, v_buf.data_ptr(), v_b, v_h, v_t, *mask_args,
            0 if positions is None else positions.data_ptr(), 0 if positions is None else positions.stride(0),
            out.data_ptr(), lens.data_ptr(), batch, heads // group, n, capacity,
        )  # fmt: skip
        return out

    return call
