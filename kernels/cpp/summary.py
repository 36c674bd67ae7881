"""Generated C++ that keeps summaries of keys (page bounds, page means, chosen channels) up to date."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor, int32, int64

from ..selection_spec import SummarySpec
from ..spec import DTYPES
from .compile import compile_source, missing_toolchain, render
from .formats import C_TYPES, MAX_HEAD_DIM

Summarise = Callable[..., None]

MAX_BLOCK = 1024

FIELDS = ("k, k_b, k_h, k_t, k_d", "summary, s_b, s_h, s_n, capacity", "sums, lens, first, channels, B, HKV, n")


def supports(spec: SummarySpec) -> str | None:
    """Why no C++ summary can be generated for ``spec``, in one line for the user; None when one can."""
    for dtype in (spec.dtype, spec.stored):
        if dtype not in C_TYPES:
            return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {dtype}"
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {spec.head_dim}"
    if spec.block > MAX_BLOCK:
        return f"the C++ kernel handles blocks of up to {MAX_BLOCK} slots; found {spec.block}"
    return missing_toolchain()


def source(spec: SummarySpec) -> str:
    """The C++ source of the update of ``spec``; equal specs give equal text."""
    return render(
        "summary.cpp.jinja",
        title="torchaccel summaries of keys",
        spec=spec.key(),
        fields=FIELDS,
        kind=spec.kind,
        dtype=C_TYPES[spec.dtype],
        stored=C_TYPES[spec.stored],
        dim=spec.head_dim,
        block=spec.block,
        channels=spec.channels,
    )


def packed(spec: SummarySpec) -> tuple[int, ...]:
    """Strides of one row of a summary."""
    return (spec.head_dim, 1) if spec.kind == "minmax" else (1,)


@lru_cache(maxsize=256)
def summarise(spec: SummarySpec) -> Summarise:
    """The compiled update of ``spec``: ``selection_reference.summarise`` without its first argument, and its very bits.

    ``call(k_new, summary, sums, lens, first=None, channels=None)``; k_new of any strides. Raises ``ValueError`` for a
    spec that ``supports`` refuses; the returned function raises ``RuntimeError`` when the summary has too few rows.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(spec))
    dtype, stored, rows, picks = DTYPES[spec.dtype], DTYPES[spec.stored], packed(spec), spec.kind == "channels"

    def call(
        k_new: Tensor,
        summary: Tensor,
        sums: Tensor,
        lens: Tensor,
        first: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> None:
        batch, heads, n, _ = k_new.shape
        if k_new.dtype != dtype:
            k_new = k_new.to(dtype)
        strides = k_new.stride()
        if strides[3] != 1 and not picks:
            k_new = k_new.contiguous()
            strides = k_new.stride()
        if summary.dtype != stored or summary.stride()[3:] != rows:
            raise ValueError(
                f"the summary must be {stored} with rows of strides {rows}; found {summary.dtype}, {summary.stride()}"
            )
        if picks and (channels is None or channels.dtype != int32 or not channels.is_contiguous()):
            raise ValueError("kind 'channels' needs their numbers: a contiguous int32 tensor [B, H_kv, channels]")
        if first is not None and first.dtype != int64:
            first = first.to(int64)
        kernel(
            k_new.data_ptr(), *strides, summary.data_ptr(), *summary.stride()[:3], summary.shape[2],
            sums.data_ptr(), lens.data_ptr(), 0 if first is None else first.data_ptr(),
            0 if channels is None else channels.data_ptr(), batch, heads, n,
        )  # fmt: skip

    return call
