"""Generated C++ for prefill attention: a prompt attends over itself, and only sinks and windows are visited."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..spec import DTYPES, AttentionSpec
from .attention import MASK_KINDS, MAX_GROUP, int32, modifiers
from .compile import compile_source, missing_toolchain, render
from .formats import C_TYPES, MAX_HEAD_DIM

Prefill = Callable[..., Any]

TILE = 64

FIELDS = (
    "q, q_b, q_h, q_q, q_d",
    "k, k_b, k_h, k_t, k_d",
    "v, v_b, v_h, v_t, v_d",
    "mask, mask_b, mask_h, mask_q, mask_c, mask_b_size, mask_h_size, columns, mask_kind",
    "positions, positions_b, positions_h",
    "out, B, HKV, Q",
    "index, index_n",
    "head_windows, lse, mass",
)


def supports(spec: AttentionSpec) -> str | None:
    """Why no C++ prefill kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.phase != "prefill":
        return f"this kernel serves phase 'prefill'; the spec is of phase '{spec.phase}'"
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.group <= MAX_GROUP:
        return f"the C++ kernel handles 1 to {MAX_GROUP} query heads per KV head; found {spec.group}"
    for dim in (spec.head_dim, spec.value_format.head_dim):
        if not 1 <= dim <= MAX_HEAD_DIM:
            return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {dim}"
    if spec.index == "tokens":
        return "a prompt attends to lists of blocks; single tokens are listed in decode only"
    if spec.index == "blocks" and spec.index_block % 16:
        return f"listed blocks must hold a multiple of 16 tokens; found {spec.index_block}"
    if spec.positions:
        return "fresh keys of a prompt lie in order, so stored positions do not apply to prefill"
    return missing_toolchain()


def source(spec: AttentionSpec) -> str:
    """The C++ source of the prefill kernel of ``spec``; equal specs give equal text."""
    return render(
        "prefill.cpp.jinja",
        title="torchaccel prefill attention",
        spec=spec.key(),
        fields=FIELDS,
        dtype=C_TYPES[spec.dtype],
        dk=spec.head_dim,
        dv=spec.value_format.head_dim,
        group=spec.group,
        tile=gcd(TILE, spec.index_block) if spec.index == "blocks" else TILE,
        index_block=spec.index_block if spec.index == "blocks" else TILE,
        mass=spec.mass,
        key={"bits": 0},
        value={"bits": 0},
        **modifiers(spec),
    )


@lru_cache(maxsize=1024)
def prefill_attention(spec: AttentionSpec) -> Prefill:
    """The compiled kernel of ``spec``: ``reference.prefill_attention`` without its first argument.

    ``call(q, k, v, mask, index, head_windows)``: q ``[B, H, S, D]``, k, v ``[B, H_kv, S, D]``, mask
    ``[B | 1, H | 1, S, S]`` or None, any strides; out ``[B, H, S, D]`` contiguous, in the spec's dtype; index,
    head_windows and side results as in the reference. Sums are float32; with bfloat16 inputs the
    probabilities are rounded to bfloat16 before they meet the values, as flash attention does. Needs memory for one
    packed copy of k and v. Raises ``ValueError`` for a spec that ``supports`` refuses.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(spec))
    dtype, group, head_dim, masked = DTYPES[spec.dtype], spec.group, spec.value_format.head_dim, spec.mask != "none"

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        index: Tensor | None = None,
        head_windows: Tensor | None = None,
    ) -> Any:
        batch, heads, n, _ = q.shape
        if k.shape[2] != n or v.shape[2] != n:
            raise ValueError(f"prefill attends over as many keys as queries; found {n} queries and {k.shape[2]} keys")
        q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))
        out = torch.empty((batch, heads, n, head_dim), dtype=dtype)
        mask_args: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0, 3)
        if masked:
            if mask is None:
                raise ValueError(f"the kernel was generated for a mask ({spec.mask}); found none")
            if mask.dtype not in MASK_KINDS:
                mask = mask.float()
            mask_args = (mask.data_ptr(), *mask.stride(), *mask.shape[:2], mask.shape[3], MASK_KINDS[mask.dtype])
        lists, width = 0, 0
        if spec.index == "blocks":
            index = int32("index", index, (batch, heads, -(-n // spec.index_block)))
            lists, width = index.data_ptr(), index.shape[3]
        if spec.head_windows:
            head_windows = int32("head_windows", head_windows, (heads // group,))
        # The mass is found from the log-sum-exp, so one is made for it at least.
        lse = torch.empty((batch, heads, n), dtype=torch.float32) if spec.lse or spec.mass else None
        mass = torch.empty((batch, heads // group, n), dtype=torch.float32) if spec.mass else None
        if n:
            kernel(
                q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), *mask_args,
                0, 0, 0, out.data_ptr(), batch, heads // group, n, lists, width,
                *(0 if t is None else t.data_ptr() for t in (head_windows, lse, mass)),
            )  # fmt: skip
        results = [t for t, asked in ((lse, spec.lse), (mass, spec.mass)) if asked]
        return (out, *results) if results else out

    return call
