"""Generated C++ for fused programs over a few rows: one launch, every weight read once at memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..fused_spec import FusedSpec, Linear
from ..spec import DTYPES
from .attention import C_TYPES
from .compile import compile_source, missing_toolchain, render
from .fused_program import Program

Fused = Callable[[Sequence[Tensor]], list[Tensor]]

MAX_ROWS = 8
# Scratch of a thread: beyond the second-level cache the values between two layers cost more than a launch.
MAX_SCRATCH_BYTES = 1 << 20


def supports(spec: FusedSpec) -> str | None:
    """Why no C++ kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the C++ kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    if not any(isinstance(step, Linear) for step in spec.steps):
        return "the C++ kernel is built around a linear layer; found none"
    scratch = 4 * Program(spec).own
    if scratch > MAX_SCRATCH_BYTES:
        return f"the values between the layers take {scratch} bytes, more than {MAX_SCRATCH_BYTES}"
    return missing_toolchain()


def source(spec: FusedSpec) -> str:
    """The C++ source of the kernel of ``spec``; equal input gives equal text."""
    program = Program(spec)
    weights = [spec.inputs[step.weight].shape for step in spec.steps if isinstance(step, Linear)]
    fields = (
        ", ".join(f"in{i}" for i in range(len(spec.inputs))),
        ", ".join(f"out{i}" for i in range(len(spec.outputs))),
    )
    return render(
        "fused.cpp.jinja",
        spec=f"dtype {spec.dtype}, {spec.rows} rows",
        listing=spec.listing(),
        fields=fields,
        dtype=C_TYPES[spec.dtype],
        rows=spec.rows,
        weights=sum(n * k for n, k in weights),
        by_columns=any(isinstance(step, Linear) and step.by_columns for step in spec.steps),
        shared=program.shared,
        own=program.own,
        body=program.body,
    )


@lru_cache(maxsize=1024)
def fused(spec: FusedSpec) -> Fused:
    """The compiled kernel of ``spec``: ``call(inputs) -> outputs``, as ``fused_reference.fused`` without the spec.

    Raises ``ValueError`` for a spec that ``supports`` refuses, what the compiler raises, and at the call ``ValueError``
    for an input with another dtype, number of elements or, but for rows and tables, layout than the spec says.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    dtype, empty = DTYPES[spec.dtype], torch.empty
    expected = []
    for item in spec.inputs:
        count = 1
        for size in item.shape:
            count *= size
        expected.append((count, torch.int64 if item.kind == "index" else dtype, item.kind in ("rows", "table")))
    shapes = [out.shape for out in spec.outputs]
    entry = compile_source(source(spec))

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        addresses: list[int] = []
        for tensor, (count, wanted, movable) in zip(inputs, expected, strict=True):
            if tensor.numel() != count or tensor.dtype is not wanted:
                raise ValueError(
                    f"input {len(addresses)} of the kernel has {count} elements of {wanted}; "
                    f"found {list(tensor.shape)} of {tensor.dtype}"
                )
            if not tensor.is_contiguous():
                if not movable:
                    raise ValueError(f"input {len(addresses)} must be contiguous; found strides {tensor.stride()}")
                tensor = tensor.contiguous()
                kept.append(tensor)
            addresses.append(tensor.data_ptr())
        outputs = [empty(shape, dtype=dtype) for shape in shapes]
        entry(*addresses, *[out.data_ptr() for out in outputs])
        return outputs

    return call
