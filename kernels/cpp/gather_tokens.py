"""Generated C++ that gathers the same tokens of several tensors in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..gather_reference import check, in_rows
from ..gather_spec import GatherSpec
from .compile import compile_source, missing_toolchain, render

Gather = Callable[[Sequence[Tensor], Tensor], list[Tensor]]

WIDTHS = (1, 2, 4, 8)


def supports(spec: GatherSpec) -> str | None:
    """Why no C++ kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if any(item.width not in WIDTHS for item in spec.items):
        found = [item.width for item in spec.items]
        return f"the C++ kernel moves elements of {', '.join(map(str, WIDTHS))} bytes; found {found}"
    return missing_toolchain()


def source(spec: GatherSpec) -> str:
    """The C++ source of the kernel of ``spec``; equal input gives equal text."""
    names = ("x", "y", "batch", "batches", "lead", "leads", "token", "size")
    fields = ("index, B, K, N", *(", ".join(f"{name}{i}" for name in names) for i in range(len(spec.items))))
    kinds = [f"squares of {item.width} bytes" if item.square else "rows" for item in spec.items]
    return render("gather_tokens.cpp.jinja", spec=", ".join(kinds), items=spec.items, fields=fields)


@lru_cache(maxsize=256)
def gather_tokens(spec: GatherSpec) -> Gather:
    """The compiled kernel of ``spec``: ``gather_reference.gather_tokens`` without its first argument.

    ``call(inputs, index) -> [y, ...]``: inputs of any strides (what cannot be read row by row is copied), index int64
    ``[B, K]``. Raises ``ValueError`` for a spec that ``supports`` refuses, and at the call for tensors that do not fit
    it; ``RuntimeError`` for tokens that an input does not have.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    entry = compile_source(source(spec))

    def call(inputs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        index = index.contiguous()
        tokens = check(spec, inputs, index)
        arguments: list[int] = [index.data_ptr(), *index.shape, tokens]
        results, kept = [], []
        for item, x in zip(spec.items, inputs, strict=True):
            y = torch.empty(spec.shape(item, x.shape, index.shape), dtype=x.dtype)
            x, (batch, lead, token), (batches, leads, size) = in_rows(item, x, y.shape)
            kept.append(x)
            width = item.width
            arguments += (x.data_ptr(), y.data_ptr(), batch * width, batches, lead * width, leads)
            arguments += (token * width, size * width)
            results.append(y)
        entry(*arguments)
        return results

    return call
