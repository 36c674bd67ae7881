"""Summaries of keys in Triton (page bounds, page means, chosen channels): one launch brings them up to date."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..selection_spec import SummarySpec
from ..spec import DTYPES
from .source import TYPES, load, padded, render_text, scalars
from .units import on_device, rows_in_units

Summarise = Callable[..., None]

# Tokens of one program that picks channels.
TOKENS = 64

_TENSORS = {"k", "summary", "channels", "before", "sums", "first"}


def supports(spec: SummarySpec) -> str | None:
    """Why no Triton summary can be generated for ``spec``, in one line for the user; None when one can."""
    for dtype in (spec.dtype, spec.stored):
        if dtype not in TYPES:
            return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {dtype}"
    if not 1 <= spec.head_dim <= 256:
        return f"the Triton kernel handles head dims up to 256; found {spec.head_dim}"
    return None


def parameters(spec: SummarySpec) -> list[str]:
    """Run-time parameters of the generated ``summarise``, in order."""
    strides = ["s_b", "s_h", "k_b", "k_h", "k_t"]
    if spec.kind == "channels":
        return ["k", "summary", "channels", "end", "n", *strides]
    sums = ["before", "sums"] if spec.kind == "mean" else []
    return ["k", "summary", *sums, "first", "start", "end", "n", *strides]


@lru_cache(maxsize=256)
def generate(spec: SummarySpec) -> str:
    """Triton source of ``spec``: ``summarise``."""
    names = parameters(spec)
    whole = padded(spec.head_dim) == spec.head_dim
    return render_text(
        "summary.py.jinja",
        spec.head_dim,
        key=spec.key(),
        kind=spec.kind,
        parameters=names,
        scalars=scalars(names, _TENSORS),
        stored=TYPES[spec.stored],
        block=spec.block,
        channels=spec.channels,
        columns=1 << (max(spec.channels, 1) - 1).bit_length(),
        tokens=TOKENS,
        column="" if whole else " & inside",
        row_mask="" if whole else ", mask=inside, other=0",
    )


def summary_strides(spec: SummarySpec, summary: Tensor) -> tuple[int, int]:
    """Batch and head strides of a summary, in rows.

    Raises ValueError when it has another dtype than the spec says, or its rows do not lie one behind the other.
    """
    size, strides = prod(spec.row), summary.stride()
    packed = (size, *((spec.head_dim, 1) if spec.kind == "minmax" else (1,)))
    if summary.dtype != DTYPES[spec.stored] or strides[2:] != packed or strides[0] % size or strides[1] % size:
        raise ValueError(
            f"the summary must be {DTYPES[spec.stored]} with strides {packed} behind those of batch and heads; "
            f"found {summary.dtype}, {strides}"
        )
    return strides[0] // size, strides[1] // size


def checked_channels(spec: SummarySpec, channels: Tensor | None) -> Tensor | None:
    """``channels`` as the kernels read them. Raises ValueError when kind "channels" has none that it can read."""
    if spec.kind != "channels":
        return None
    if channels is None or channels.dtype != torch.int32 or not channels.is_contiguous():
        raise ValueError("kind 'channels' needs their numbers: a contiguous int32 tensor [B, H_kv, channels]")
    return channels


@lru_cache(maxsize=256)
def summarise(spec: SummarySpec) -> Summarise:
    """The update of ``spec``: ``selection_reference.summarise`` without its first argument.

    ``call(k_new, summary, sums, lens, first=None, channels=None)``; lens on the CPU, k_new of any strides. Rows without
    a live key are left as they are. Raises ``ValueError`` for a spec that ``supports`` refuses; the returned function
    raises it for a summary with too few rows, or with another dtype or layout than the spec's.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_summarise, spec, parameters(spec))


def _summarise(
    spec: SummarySpec,
    names: list[str],
    k_new: Tensor,
    summary: Tensor,
    sums: Tensor,
    lens: Tensor,
    first: Tensor | None = None,
    channels: Tensor | None = None,
) -> None:
    start, end, _ = lens.tolist()
    batch, heads, n, dim = k_new.shape
    low, high = end // spec.block, -(-(end + n) // spec.block)
    if high > summary.shape[2]:
        raise ValueError(f"the summary has {summary.shape[2]} rows, but {high} are to be stored: grow it first")
    values: dict[str, Any] = {"summary": summary, "sums": sums, "first": on_device(first, k_new.device)}
    values |= {"channels": checked_channels(spec, channels), "start": start, "end": end, "n": n}
    values["s_b"], values["s_h"] = summary_strides(spec, summary)
    if not n:
        return
    values["k"], *strides = rows_in_units(k_new.to(DTYPES[spec.dtype]), dim)
    values |= zip(("k_b", "k_h", "k_t"), strides, strict=True)
    # Where the first row is open, another program may be at the last one and store its sums.
    values["before"] = sums.clone() if spec.kind == "mean" and high - low > 1 and end % spec.block else sums
    programs = -(-n // TOKENS) if spec.kind == "channels" else high - low
    module = load(generate(spec), "summary")
    with torch.cuda.device_of(k_new):
        module.summarise[(programs, heads, batch)](*(values[name] for name in names), num_warps=2)
