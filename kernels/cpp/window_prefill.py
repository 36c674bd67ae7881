"""Generated C++ for prefill attention: a prompt attends over itself, and only sinks and windows are visited."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..spec import DTYPES, AttentionSpec
from .attention import C_TYPES, MASK_KINDS, MAX_GROUP, MAX_HEAD_DIM, modifiers
from .compile import compile_source, missing_toolchain, render

Prefill = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

FIELDS = (
    "q, q_b, q_h, q_q, q_d",
    "k, k_b, k_h, k_t, k_d",
    "v, v_b, v_h, v_t, v_d",
    "mask, mask_b, mask_h, mask_q, mask_c, mask_b_size, mask_h_size, columns, mask_kind",
    "positions, positions_b",
    "out, B, HKV, Q",
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
        **modifiers(spec),
    )


@lru_cache(maxsize=1024)
def prefill_attention(spec: AttentionSpec) -> Prefill:
    """The compiled kernel of ``spec``: ``reference.prefill_attention`` without its first argument.

    ``call(q, k, v, mask) -> out``: q ``[B, H, S, D]``, k, v ``[B, H_kv, S, D]``, mask ``[B | 1, H | 1, S, S]`` or None,
    any strides; out ``[B, H, S, D]`` contiguous, in the spec's dtype. Sums are float32; with bfloat16 inputs the
    probabilities are rounded to bfloat16 before they meet the values, as flash attention does. Needs memory for one
    packed copy of k and v. Raises ``ValueError`` for a spec that ``supports`` refuses.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(spec))
    dtype, group, head_dim, masked = DTYPES[spec.dtype], spec.group, spec.value_format.head_dim, spec.mask != "none"

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
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
        if n:
            kernel(
                q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), *mask_args,
                0, 0, out.data_ptr(), batch, heads // group, n,
            )  # fmt: skip
        return out

    return call
