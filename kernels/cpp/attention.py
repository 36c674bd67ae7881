"""Generated C++ for decode attention: append to a KV buffer, then attend over everything stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from .. import rotary
from ..spec import DTYPES, AttentionSpec, KVFormat
from .compile import Entry, compile_source, missing_toolchain, render
from .formats import C_TYPES, additions, symbols, unsupported

Decode = Callable[..., Any]

MASK_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
MAX_GROUP = 64
DENSE_TILE = 64
# Waking a second thread costs a few microseconds, about the time one core needs for these many tiles of 64 keys.
MIN_TILES = 8
# New tokens times heads of a group, from which on tiles are packed and multiplied with all rows at once.
MANY_ROWS = 24

FIELDS = (
    "q, q_b, q_h, q_q, q_d",
    "k_new, kn_b, kn_h, kn_q, kn_d",
    "v_new, vn_b, vn_h, vn_q, vn_d",
    "k, k_b, k_h, k_t",
    "v, v_b, v_h, v_t",
    "mask, mask_b, mask_h, mask_q, mask_c, mask_b_size, mask_h_size, columns, mask_kind",
    "positions, positions_b, positions_h",
    "out, lens, B, HKV, Q, capacity",
    "index, index_b, index_h, index_n",
    "head_windows, lse, mass",
)
# Behind the others, for specs that rotate q and k_new.
ROTARY_FIELDS = ("cos, cos_b, cos_q, cos_d", "sin, sin_b, sin_q, sin_d", "table_kind")
# Behind the others, for latent keys, and behind those for latent values.
LATENT_KEY_FIELDS = ("projection, rotary, rotary_s, rotary_b, rotary_size",)
LATENT_VALUE_FIELDS = ("value_projection",)
SPLITS = ("stream", "kv", "single")


def supports(spec: AttentionSpec) -> str | None:
    """Why no C++ decode kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.phase != "decode":
        return f"this kernel serves phase 'decode'; the spec is of phase '{spec.phase}'"
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.group <= MAX_GROUP:
        return f"the C++ kernel handles 1 to {MAX_GROUP} query heads per KV head; found {spec.group}"
    for name, fmt, packing in (("key", spec.key_format, "channel"), ("value", spec.value_format, "token")):
        reason = unsupported(fmt, name)
        if reason:
            return reason
        if fmt.kind == "latent" and spec.index == "tokens":
            return f"latents are rebuilt into {name}s tile by tile: lists of single tokens cannot be read so"
        if fmt.is_quantised and fmt.packing != packing:
            return f"codes of {name}s must lie side by side by {packing}; found {fmt.packing}"
        if fmt.is_quantised and fmt.axis == "token" and fmt.group_size % (32 // fmt.bits) and fmt.groups > fmt.block:
            return f"groups of {name} channels must fill whole bytes, {32 // fmt.bits} channels; found {fmt.group_size}"
    if spec.index == "blocks" and spec.index_block % 16:
        return f"listed blocks must hold a multiple of 16 slots; found {spec.index_block}"
    return rotary.refused(spec) or missing_toolchain()


def tile_of(spec: AttentionSpec) -> int:
    """Keys handled at a time: at most 64, of one block of codes, of one group of scales, of one listed block."""
    sizes = [DENSE_TILE]
    for fmt in (spec.key_format, spec.value_format):
        if fmt.is_blocked and spec.index != "tokens":
            sizes += [fmt.block] + ([fmt.group_size] if fmt.axis == "channel" and fmt.is_quantised else [])
    if spec.index == "blocks":
        sizes.append(spec.index_block)
    return gcd(*sizes)


def configs(spec: AttentionSpec) -> Iterator[tuple[tuple[str, str], ...]]:
    """The free choices of a decode kernel: how its tiles are shared among threads, the seed first."""
    for split in SPLITS:
        yield (("split", split),)


def source(spec: AttentionSpec, split: str = "stream", many: bool = False) -> str:
    """The C++ source of the decode kernel of ``spec``, for few or many rows; equal arguments give equal text."""
    tile = tile_of(spec)
    return render(
        "attention.cpp.jinja",
        title="torchaccel decode attention",
        spec=spec.key(),
        fields=FIELDS + _more_fields(spec),
        q_type=C_TYPES[spec.dtype],
        key=symbols(spec.key_format),
        value=symbols(spec.value_format),
        group=spec.group,
        tile=tile,
        per_entry=spec.index_block // tile,
        min_tiles=MIN_TILES,
        rows="many_rows.cpp.jinja" if many else "few_rows.cpp.jinja",
        max_rows=96 if many else 32,
        split=split,
        lse=spec.lse,
        mass=spec.mass,
        rotary=spec.rotary,
        rotary_dim=spec.rotary_dim,
        **additions(spec.key_format, spec.value_format),
        **modifiers(spec),
    )


def _more_fields(spec: AttentionSpec) -> tuple[str, ...]:
    found: tuple[str, ...] = ROTARY_FIELDS if spec.rotary != "none" else ()
    found += LATENT_KEY_FIELDS if spec.key_format.kind == "latent" else ()
    return found + (LATENT_VALUE_FIELDS if spec.value_format.kind == "latent" else ())


def modifiers(spec: AttentionSpec) -> dict[str, object]:
    """The symbols of modifiers.cpp.jinja: how scores are changed and which keys are seen."""
    return {
        "scale": float(spec.scale),
        "softcap": None if spec.softcap is None else float(spec.softcap),
        "causal": _bool(spec.causal),
        "windowed": _bool(spec.window is not None),
        "window": spec.window or 0,
        "sinks": spec.sinks,
        "head_windows": _bool(spec.head_windows),
        "positions": _bool(spec.positions),
        "block_list": _bool(spec.index == "blocks"),
        "token_list": _bool(spec.index == "tokens"),
        "bool_mask": _bool(spec.mask == "bool"),
        "additive_mask": _bool(spec.mask == "additive"),
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"


@lru_cache(maxsize=1024)
def decode_attention(spec: AttentionSpec, split: str = "stream") -> Decode:
    """The compiled kernel of ``spec``: ``reference.decode_attention`` without its first argument.

    ``call(q, k_new, v_new, k_buf, v_buf, lens, mask, positions, index, head_windows, cos, sin, projection, table,
    value_projection)``, shapes and results as in the reference. q, k_new, v_new, the mask, cos and sin may have any
    strides; the buffers need a contiguous last dimension. With k_new and v_new None nothing is appended and slots
    ``lens[0] .. lens[1]`` are attended. Results are contiguous.

    split: how threads share the tiles, "stream" (stream-K: equal shares of all tiles), "kv" (each KV head's tiles cut
    in as many parts as there are threads) or "single" (a KV head to a thread). Raises ``ValueError`` for a spec that
    ``supports`` refuses; the returned function raises ``RuntimeError`` when the buffer is full.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}; found {split!r}")

    @lru_cache(maxsize=2)
    def kernel_of(many: bool) -> Entry:
        return compile_source(source(spec, split, many))

    few = kernel_of(False)
    key, value = spec.key_format, spec.value_format
    k_dtype, v_dtype, dtype = DTYPES[key.dtype], DTYPES[value.dtype], DTYPES[spec.dtype]
    k_coded, v_coded = key.is_blocked, value.is_blocked
    k_latent, v_latent = key.kind == "latent", value.kind == "latent"
    indexed, sides = spec.index != "contiguous", spec.lse or spec.mass
    group, head_dim = spec.group, value.head_dim
    masked, windows, rotates = spec.mask != "none", spec.head_windows, spec.rotary != "none"
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
        index: Tensor | None = None,
        head_windows: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        projection: Tensor | None = None,
        table: Tensor | None = None,
        value_projection: Tensor | None = None,
    ) -> Any:
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
        if k_coded:
            k_b, k_h, unit = k_buf.stride()
            k_t = 0
            capacity = (k_buf.shape[2] - key.tail_bytes) // key.block_bytes * key.block
        else:
            k_b, k_h, k_t, unit = k_buf.stride()
            capacity = k_buf.shape[2]
        if v_coded:
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
        extra: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0)
        results = []
        if indexed or windows or sides:
            if indexed:
                index = int32("index", index, (batch, heads // group))
                extra = (index.data_ptr(), *index.stride()[:2], index.shape[2], *extra[4:])
            if windows:
                head_windows = int32("head_windows", head_windows, (heads // group,))
                extra = (*extra[:4], head_windows.data_ptr(), *extra[5:])
            if spec.lse:
                results.append(empty((batch, heads, n), dtype=torch.float32))
                extra = (*extra[:5], results[-1].data_ptr(), *extra[6:])
            if spec.mass:
                results.append(empty((batch, heads // group, capacity), dtype=torch.float32))
                extra = (*extra[:6], results[-1].data_ptr())
        place = (0, 0, 0) if positions is None else (positions.data_ptr(), positions.stride(0), head_stride(positions))
        if rotates:
            cos, sin = rotary.tables(spec, cos, sin, batch, n)
            if cos.dtype != sin.dtype or cos.dtype not in MASK_KINDS:
                cos, sin = cos.float(), sin.float()
            extra += table_arguments(cos, sin)
        if k_latent:
            projection = _rebuilding("keys", key, projection, heads // group)
            extra = (*extra, projection.data_ptr(), *_table_arguments(table))
        if v_latent:
            value_projection = _rebuilding("values", value, value_projection, heads // group)
            extra = (*extra, value_projection.data_ptr())
        kernel = few if n * group < MANY_ROWS else kernel_of(True)
        kernel(
            q.data_ptr(), *q.stride(), *k_args, *v_args,
            k_buf.data_ptr(), k_b, k_h, k_t, v_buf.data_ptr(), v_b, v_h, v_t, *mask_args,
            *place,
            out.data_ptr(), lens.data_ptr(), batch, heads // group, n, capacity, *extra,
        )  # fmt: skip
        return (out, *results) if sides else out

    return call


def head_stride(positions: Tensor) -> int:
    """Elements from one KV head's positions to the next's; 0 where the heads share them."""
    return positions.stride(1) if positions.shape[1] > 1 else 0


def table_arguments(cos: Tensor, sin: Tensor) -> tuple[int, ...]:
    """``ROTARY_FIELDS`` of tables ``[B | 1, Q, rotary_dim]``: a table of one row serves every row of the batch."""
    cos_b, cos_q, cos_d = cos.stride()
    sin_b, sin_q, sin_d = sin.stride()
    if cos.shape[0] == 1:
        cos_b = sin_b = 0
    return cos.data_ptr(), cos_b, cos_q, cos_d, sin.data_ptr(), sin_b, sin_q, sin_d, MASK_KINDS[cos.dtype]


def _rebuilding(name: str, fmt: KVFormat, projection: Tensor | None, heads: int) -> Tensor:
    """What latents are rebuilt with, as the kernel reads it."""
    shape = heads, heads * fmt.rank, fmt.head_dim
    if projection is None or tuple(projection.shape) != shape:
        found = None if projection is None else list(projection.shape)
        raise ValueError(f"latent {name} need a projection {list(shape)}; found {found}")
    return projection.to(DTYPES[fmt.dtype]).contiguous()


def _table_arguments(table: Tensor | None) -> tuple[int, ...]:
    """Address; steps from cosine to sine and from a batch row to the next, 0 where they share one; channels turned."""
    if table is None:
        return 0, 0, 0, 0
    if table.dtype != torch.float32 or table.stride()[2:] != (table.shape[3], 1):
        raise ValueError(f"a rotary table is float32 with its columns one after another; found {table.dtype}")
    one, row, _, _ = table.stride()
    return table.data_ptr(), one, row if table.shape[1] > 1 else 0, table.shape[3]


def int32(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """``value`` as contiguous int32, after a check that it is there and begins with the sizes ``shape``."""
    if value is None:
        raise ValueError(f"the kernel was generated for '{name}'; found none")
    if tuple(value.shape[: len(shape)]) != shape:
        raise ValueError(f"'{name}' must begin with the sizes {list(shape)}; found {list(value.shape)}")
    return value.to(torch.int32).contiguous()
