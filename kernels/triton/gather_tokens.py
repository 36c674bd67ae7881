"""The same tokens of several tensors in Triton, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..gather_reference import check, in_rows
from ..gather_spec import GatherSpec
from .source import load, render_text, scalars

Gather = Callable[[Sequence[Tensor], Tensor], list[Tensor]]

# What is only moved has the type of its size.
MOVED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COLUMNS = 1024
_NUMBERS = ("batch", "lead", "leads", "token", "n", "end")


def supports(spec: GatherSpec) -> str | None:
    """Why no Triton kernel can be generated for ``spec``, in one line for the user; None when one can."""
    found = [item.width for item in spec.items]
    if any(width not in MOVED for width in found):
        return f"the Triton kernel moves elements of {', '.join(map(str, MOVED))} bytes; found {found}"
    return None


@lru_cache(maxsize=256)
def generate(spec: GatherSpec) -> str:
    """Triton source of ``spec``: ``gather``."""
    kinds = ", ".join(f"squares of {item.width} bytes" if item.square else "rows" for item in spec.items)
    numbers = ["B", "K", "N", *(f"{name}{i}" for i in range(len(spec.items)) for name in _NUMBERS)]
    return render_text("gather_tokens.py.jinja", spec=kinds, items=spec.items, scalars=scalars(numbers, set()))


@lru_cache(maxsize=256)
def gather_tokens(spec: GatherSpec) -> Gather:
    """The kernel of ``spec``: ``gather_reference.gather_tokens`` without its first argument.

    ``call(inputs, index) -> [y, ...]``: inputs of any strides (what cannot be read row by row is copied), index int64
    ``[B, K]``; tokens that an input does not have are zero, where the reference raises. Raises ``ValueError`` for a
    spec that ``supports`` refuses, and at the call for tensors that do not fit it.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_gather_tokens, spec)


def _gather_tokens(spec: GatherSpec, inputs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    tokens = check(spec, inputs, index)
    index = index.contiguous()
    count = index.shape[1]
    arguments: list[Any] = [index, *index.shape, tokens]
    results, end = [], 0
    for item, x in zip(spec.items, inputs, strict=True):
        y = x.new_empty(spec.shape(item, tuple(x.shape), tuple(index.shape)))
        x, (batch, lead, token), (batches, leads, size) = in_rows(item, x, tuple(y.shape))
        n = count if item.square else size
        end += batches * leads * count * -(-n // COLUMNS)
        moved = MOVED[item.width]
        arguments += (x.view(moved), y.view(moved), batch, lead, max(leads, 1), token, n, end)
        results.append(y)
    if end:
        module = load(generate(spec), "gather_tokens")
        with torch.cuda.device_of(index):
            module.gather[(end,)](*arguments, BC=COLUMNS, num_warps=4)
    return results
