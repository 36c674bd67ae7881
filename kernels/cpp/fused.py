"""Generated C++ for fused programs over a few rows: one launch, every weight read once at memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..fused_spec import FusedSpec, Linear
from ..spec import DTYPES
from .attention import C_TYPES
from .compile import compile_source, missing_toolchain, render
from .fused_program import Program
from .linear import other_streams

Fused = Callable[[Sequence[Tensor]], list[Tensor]]

MAX_ROWS = 8
# Scratch of a thread: beyond the second-level cache the values between two layers cost more than a launch.
MAX_SCRATCH_BYTES = 1 << 20
# Of weights, below which a second thread is not woken.
GRAIN_BYTES = 1 << 16
# Whether one thread runs the whole program: where its weights are few, or as the tuner found best. Nothing in between:
# when teams change their size, libgomp ends threads and starts them again.
ALONE = {"": "WEIGHT_BYTES < GRAIN_BYTES", "one": "true", "all": "false"}


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


def configs(spec: FusedSpec) -> Iterator[tuple[tuple[str, int | str], ...]]:
    """The free choices, the seed first: how many rows of a weight are read together, and by how many threads."""
    yield ()
    if any(isinstance(step, Linear) and not step.by_columns for step in spec.steps):
        yield (("streams", other_streams(spec.rows)),)
    few = _weights(spec) * DTYPES[spec.dtype].itemsize < GRAIN_BYTES
    yield (("threads", "all" if few else "one"),)


def _weights(spec: FusedSpec) -> int:
    """Elements of all weights that the program reads."""
    shapes = [spec.inputs[step.weight].shape for step in spec.steps if isinstance(step, Linear)]
    return sum(n * k for n, k in shapes)


def source(spec: FusedSpec, streams: int = 0, threads: str = "") -> str:
    """The C++ source of the kernel of ``spec``; equal input gives equal text."""
    program = Program(spec)
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
        weights=_weights(spec),
        grain=GRAIN_BYTES,
        streams=streams,
        alone=ALONE[threads],
        by_columns=any(isinstance(step, Linear) and step.by_columns for step in spec.steps),
        shared=program.shared,
        own=program.own,
        body=program.body,
    )


@lru_cache(maxsize=1024)
def fused(spec: FusedSpec, streams: int = 0, threads: str = "") -> Fused:
    """The compiled kernel of ``spec``: ``call(inputs) -> outputs``, as ``fused_reference.fused`` without the spec.

    streams, threads: see ``configs``; 0 streams are as many as suit the registers. Raises ``ValueError`` for a spec
    that ``supports`` refuses, what the compiler raises, and at the call ``ValueError`` for an input with another dtype,
    number of elements or, but for rows and tables, layout than the spec says.
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
    entry = compile_source(source(spec, streams, threads))

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
