"""Generated C++ that sums what some rows of a prompt attend to over columns and diagonals, or over blocks of keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..row_reference import last_rows
from ..spec import DTYPES, AttentionSpec
from .compile import Entry, compile_source, missing_toolchain, render
from .formats import C_TYPES, MAX_HEAD_DIM

FIELDS = (
    "q, q_b, q_h, q_t",
    "k, k_b, k_h, k_t",
    "rows, ends, first, columns, diagonals, blocks",
    "B, HKV, M, R, S, block",
)


def supports(spec: AttentionSpec) -> str | None:
    """Why no C++ can be generated for ``spec``, in one line for the user; None when it can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {spec.head_dim}"
    return missing_toolchain()


def source(spec: AttentionSpec) -> str:
    """The C++ source; specs that are equal in head dim, group, dtype, scale and softcap give equal text."""
    return render(
        "row_attention.cpp.jinja",
        title="torchaccel sums of some rows of attention",
        fields=FIELDS,
        dtype=C_TYPES[spec.dtype],
        dim=spec.head_dim,
        group=spec.group,
        scale=spec.scale,
        softcap=spec.softcap,
    )


@lru_cache(maxsize=1024)
def line_scores(spec: AttentionSpec) -> Callable[..., tuple[Tensor, Tensor]]:
    """``row_reference.line_scores`` without its first argument, compiled; q and k of any strides."""
    kernel = compile_source(source(spec))

    def call(q: Tensor, k: Tensor, count: int, first: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, _ = q.shape
        rows = last_rows(tokens, count, batch, q.device)
        columns, diagonals = (torch.empty((batch, heads, tokens)) for _ in range(2))
        _run(kernel, spec, q, k, rows[:, None], None, first, columns.data_ptr(), diagonals.data_ptr(), 0, 1)
        return columns, diagonals

    return call


@lru_cache(maxsize=1024)
def block_weights(spec: AttentionSpec) -> Callable[..., Tensor]:
    """``row_reference.block_weights`` without its first argument, compiled; q and k of any strides."""
    kernel = compile_source(source(spec))

    def call(q: Tensor, k: Tensor, rows: Tensor, first: Tensor | None, block: int) -> Tensor:
        batch, heads, tokens, _ = q.shape
        out = torch.empty((batch, heads, rows.shape[1], -(-tokens // block)))
        _run(kernel, spec, q, k, rows[:, None], None, first, 0, 0, out.data_ptr(), block)
        return out

    return call


@lru_cache(maxsize=1024)
def set_weights(spec: AttentionSpec) -> Callable[..., Tensor]:
    """``row_reference.set_weights`` without its first argument, compiled; q and k of any strides."""
    kernel = compile_source(source(spec))

    def call(q: Tensor, k: Tensor, rows: Tensor, ends: Tensor, first: Tensor | None) -> Tensor:
        out = torch.empty((*q.shape[:2], rows.shape[1], k.shape[2]))
        _run(kernel, spec, q, k, rows, ends, first, out.data_ptr(), 0, 0, 1)
        return out

    return call


def _run(
    kernel: Entry,
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    ends: Tensor | None,
    first: Tensor | None,
    *results: int,
) -> None:
    """Call the kernel; results: addresses of columns, diagonals and blocks, or 0, and the tokens of a block."""
    dtype = DTYPES[spec.dtype]
    q, k = (t if t.dtype == dtype else t.to(dtype) for t in (q, k))
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    rows, ends = rows.contiguous(), None if ends is None else ends.contiguous()
    first = None if first is None else first.to(torch.int64).contiguous()
    *outputs, block = results
    kernel(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], rows.data_ptr(),
        *(0 if x is None else x.data_ptr() for x in (ends, first)), *outputs,
        k.shape[0], k.shape[1], rows.shape[1], rows.shape[2], k.shape[2], block,
    )  # fmt: skip
