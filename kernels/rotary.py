"""Rotary position embedding of the queries and the new keys, which attention over a cache applies itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .spec import AttentionSpec


def refused(spec: AttentionSpec) -> str | None:
    """Why no kernel rotates as ``spec`` asks, in one line for the user; None when one can, or need not."""
    if spec.rotary == "none":
        return None
    if spec.phase != "decode":
        return f"queries and keys are rotated in the phase 'decode' only; the spec is of phase '{spec.phase}'"
    if spec.rotary_dim % 2 or not 2 <= spec.rotary_dim <= spec.head_dim:
        return f"an even number of channels is rotated, 2 to {spec.head_dim}; found rotary_dim {spec.rotary_dim}"
    return None


def rotated(spec: AttentionSpec, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """``x`` with the first ``rotary_dim`` channels of every head rotated; x itself where the spec does not rotate.

    x: ``[B, H, Q, D]``. cos, sin: ``[B | 1, Q, rotary_dim]``, any dtype. A pair of channels (a, b) of "half" is
    (i, i + rotary_dim / 2), of "interleaved" (2 i, 2 i + 1), and becomes (a cos_a - b sin_a, b cos_b + a sin_b) in
    float32, rounded once to x's dtype. Raises ``ValueError`` when the spec rotates and a table is missing or of another
    shape (RoFormer, arXiv:2104.09864; rotate_half as in GPT-NeoX, pairs as in GPT-J).
    """
    if spec.rotary == "none":
        return x
    batch, _, tokens, _ = x.shape
    cos, sin = (table[:, None].float() for table in tables(spec, cos, sin, batch, tokens))
    head = x[..., : spec.rotary_dim].float()
    if spec.rotary == "half":
        a, b = head.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
    return torch.cat(((head * cos + turned * sin).to(x.dtype), x[..., spec.rotary_dim :]), -1)


def before(attend: Callable[..., Any], spec: AttentionSpec) -> Callable[..., Any]:
    """Decode attention that rotates q and k_new as ``spec`` says and then calls ``attend``, which does not rotate.

    attend: any implementation of ``reference.decode_attention`` for a spec that does not rotate, without that spec.
    """

    def run(q: Tensor, k_new: Tensor | None, v_new: Tensor | None, *rest: Any) -> Any:
        # Behind k_buf, v_buf, lens, mask, positions, index and head_windows.
        cos, sin = rest[7:9]
        k_new = None if k_new is None else rotated(spec, k_new, cos, sin)
        return attend(rotated(spec, q, cos, sin), k_new, v_new, *rest[:7], None, None, *rest[9:])

    return run


def tables(
    spec: AttentionSpec, cos: Tensor | None, sin: Tensor | None, batch: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """cos and sin, after a check that both are there and are ``[batch | 1, tokens, rotary_dim]``."""
    if cos is None or sin is None:
        raise ValueError(f"the kernel was generated for rotary embedding ('{spec.rotary}') and needs cos and sin")
    rows, columns, dim = cos.shape
    if cos.shape != sin.shape or columns != tokens or dim != spec.rotary_dim or rows not in (1, batch):
        raise ValueError(
            f"cos and sin must be of shape [{batch} or 1, {tokens}, {spec.rotary_dim}]; found {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    return cos, sin
