"""Block selection for a prompt in Triton: an estimate of every block pair below the diagonal, then the choice by it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..selection_spec import PromptSelectionSpec
from ..spec import DTYPES
from .selection import choice
from .source import TYPES, load, render_text, scalars
from .units import on_device, rows_in_units

SelectPrompt = Callable[..., Tensor]

# Rows of a block of queries that a tile can hold.
MAX_ROWS = 64
# Blocks that one step of the choice holds in registers.
STEP = 512

_TENSORS = {"q", "k", "first", "scores"}


def supports(spec: PromptSelectionSpec) -> str | None:
    """Why no Triton selection can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in TYPES:
        return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {spec.dtype}"
    if not 1 <= spec.head_dim <= 256:
        return f"the Triton kernel handles head dims up to 256; found {spec.head_dim}"
    if _rows(spec) > MAX_ROWS:
        return f"the Triton kernel handles blocks of up to {MAX_ROWS} strides; found {_rows(spec)}"
    return None


def parameters(spec: PromptSelectionSpec) -> list[str]:
    """Run-time parameters of the generated ``estimate``, in order."""
    strides = [f"{x}_{dim}" for x in "qk" for dim in "bht"] if spec.estimate == "antidiagonal" else []
    return ["q", "k", "first", "scores", "tokens", *strides]


def tile(spec: PromptSelectionSpec) -> tuple[int, int, int]:
    """Rows of queries and of keys in a tile of the estimate, and the warps that work on it."""
    half = spec.dtype != "float32" and spec.estimate == "antidiagonal"
    queries, keys = (64, 64) if half and spec.head_dim <= 128 else (32, 32 if half or spec.head_dim <= 128 else 16)
    return max(queries, _places(spec)), max(keys, _places(spec)), 4 if spec.head_dim <= 64 else 8


def _rows(spec: PromptSelectionSpec) -> int:
    """Rows of a block."""
    return spec.block // spec.stride if spec.estimate == "antidiagonal" else 1


def _places(spec: PromptSelectionSpec) -> int:
    return 1 << (_rows(spec) - 1).bit_length()


@lru_cache(maxsize=512)
def generate(spec: PromptSelectionSpec) -> str:
    """Triton source of ``spec``: ``average`` for means, ``estimate`` and ``choose``."""
    antidiagonal = spec.estimate == "antidiagonal"
    return render_text(
        "prompt_selection.py.jinja",
        spec.head_dim,
        key=spec.key(),
        parameters=parameters(spec),
        scalars=partial(scalars, tensors=_TENSORS),
        antidiagonal=antidiagonal,
        G=spec.group,
        EP=_places(spec),
        rows=_rows(spec),
        block=spec.block,
        stride=spec.stride if antidiagonal else spec.block,
        softcap=spec.softcap,
        **choice(spec),
    )


@lru_cache(maxsize=1024)
def select_prompt(spec: PromptSelectionSpec) -> SelectPrompt:
    """The selection of ``spec``: ``selection_reference.select_prompt`` without its first argument.

    ``call(q, k, first=None) -> index``; q and k of any strides. Needs memory for float32 scores ``[B, H, N, N]``, N the
    number of blocks. Raises ``ValueError`` for a spec that ``supports`` refuses.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_select, spec, False)


@lru_cache(maxsize=1024)
def prompt_scores(spec: PromptSelectionSpec) -> SelectPrompt:
    """The scores alone, from the same kernels: ``selection_reference.prompt_scores`` without its first argument."""
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_select, spec, True)


def _select(spec: PromptSelectionSpec, scored: bool, q: Tensor, k: Tensor, first: Tensor | None = None) -> Tensor:
    batch, heads, tokens, dim = q.shape
    if k.shape[2] != tokens:
        raise ValueError(f"a prompt has as many keys as queries; found {tokens} queries and {k.shape[2]} keys")
    blocks = -(-tokens // spec.block)
    got = q.new_empty((batch, heads, blocks, blocks), dtype=torch.float32)
    if scored:
        got.fill_(0 if spec.probabilities else -torch.inf)
    width = spec.width or blocks
    out = q.new_empty((batch, heads, blocks, width), dtype=torch.int32)
    module, first = load(generate(spec), "prompt_selection"), on_device(first, q.device)
    values: dict[str, Any] = {"first": first, "scores": got, "tokens": tokens}
    queries, keys, warps = tile(spec)
    with torch.cuda.device_of(q):
        for name, x in (("q", q), ("k", k)):
            x, *strides = rows_in_units(x.to(DTYPES[spec.dtype]), dim)
            values |= {name: x} | dict(zip((f"{name}_b", f"{name}_h", f"{name}_t"), strides, strict=True))
            if spec.estimate == "mean":
                values[name] = q.new_empty((batch, x.shape[1], blocks, dim), dtype=torch.float32)
                module.average[(blocks, x.shape[1], batch)](x, values[name], first, tokens, *strides, num_warps=2)
        arguments = (values[name] for name in parameters(spec))
        places = queries // _places(spec)
        module.estimate[(-(-blocks // places), heads, batch)](
            *arguments, BM=queries, BN=keys, num_warps=warps, num_stages=2
        )
        if scored:
            return got
        module.choose[(blocks, heads, batch)](got, out, first, width, BC=STEP, num_warps=2)
    return out
