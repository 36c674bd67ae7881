"""Generated C++ that estimates which blocks of keys every block of a prompt's queries needs, and chooses them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..selection_spec import PromptSelectionSpec
from ..spec import DTYPES
from .compile import compile_source, missing_toolchain, render
from .formats import C_TYPES, MAX_HEAD_DIM
from .selection import choice

SelectPrompt = Callable[..., Tensor]

FIELDS = ("q, q_b, q_h, q_t", "k, k_b, k_h, k_t", "first, out, scores, B, HKV, S, width")

MAX_BLOCK = 1024


def supports(spec: PromptSelectionSpec) -> str | None:
    """Why no C++ selection can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {spec.head_dim}"
    if spec.block > MAX_BLOCK:
        return f"the C++ kernel handles blocks of up to {MAX_BLOCK} tokens; found {spec.block}"
    return missing_toolchain()


def source(spec: PromptSelectionSpec) -> str:
    """The C++ source of the selection of ``spec``; equal specs give equal text."""
    return render(
        "prompt_selection.cpp.jinja",
        title="torchaccel choice of blocks for a prompt",
        spec=spec.key(),
        fields=FIELDS,
        dtype=C_TYPES[spec.dtype],
        dim=spec.head_dim,
        group=spec.group,
        block=spec.block,
        stride=spec.stride,
        softcap=spec.softcap,
        **choice(spec.width, spec.sinks, spec.recent, spec.scale, spec.mass, spec.probabilities),
    )


@lru_cache(maxsize=1024)
def select_prompt(spec: PromptSelectionSpec) -> SelectPrompt:
    """The compiled selection of ``spec``: ``selection_reference.select_prompt`` without its first argument.

    ``call(q, k, first=None) -> index``; q and k of any strides. Needs memory for one packed copy of k. Raises
    ``ValueError`` for a spec that ``supports`` refuses.
    """
    return _function(spec, False)


@lru_cache(maxsize=1024)
def prompt_scores(spec: PromptSelectionSpec) -> SelectPrompt:
    """The scores alone, from the same kernel: ``selection_reference.prompt_scores`` without its first argument."""
    return _function(spec, True)


def _function(spec: PromptSelectionSpec, scored: bool) -> SelectPrompt:
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(spec))
    dtype, group, block = DTYPES[spec.dtype], spec.group, spec.block

    def call(q: Tensor, k: Tensor, first: Tensor | None = None) -> Tensor:
        batch, heads, tokens, _ = q.shape
        if k.shape[2] != tokens:
            raise ValueError(f"a prompt has as many keys as queries; found {tokens} queries and {k.shape[2]} keys")
        q, k = (t if t.dtype == dtype else t.to(dtype) for t in (q, k))
        q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
        if first is not None and first.dtype != torch.int64:
            first = first.to(torch.int64)
        blocks = -(-tokens // block)
        width = spec.width or blocks
        shape = (batch, heads, blocks, blocks if scored else width)
        out = torch.empty(shape, dtype=torch.float32 if scored else torch.int32)
        kernel(
            q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], 0 if first is None else first.data_ptr(),
            0 if scored else out.data_ptr(), out.data_ptr() if scored else 0, batch, heads // group, tokens, width,
        )  # fmt: skip
        return out

    return call
