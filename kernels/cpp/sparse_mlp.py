"""Generated C++ for gated MLPs of a few rows by neurons: those that are listed are read once, the others not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..sparse_spec import SparseMlpSpec
from ..spec import DTYPES
from .compile import compile_source, missing_toolchain, render
from .formats import C_TYPES
from .linear import MAX_ROWS

SparseMlp = Callable[..., Tensor]


def supports(spec: SparseMlpSpec) -> str | None:
    """Why no C++ kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the C++ kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return missing_toolchain()


def source(spec: SparseMlpSpec) -> str:
    """The C++ source of the kernel of ``spec``; equal input gives equal text."""
    return render(
        "sparse_mlp.cpp.jinja",
        spec=f"dtype {spec.dtype}, at most {spec.rows} rows, {spec.activation}",
        fields=("x, x_row, x_column, M, H", "gate, up, down, gate_row, up_row, down_row, F", "list, lists, L", "y"),
        dtype=C_TYPES[spec.dtype],
        rows=spec.rows,
        activation=spec.activation,
        streams=0,
    )


@lru_cache(maxsize=256)
def sparse_mlp(spec: SparseMlpSpec) -> SparseMlp:
    """The compiled kernel of ``spec``: ``sparse_reference.sparse_mlp`` without its first argument.

    ``call(x, gate, up, down, neurons=None) -> y``: x ``[..., hidden]`` of any strides, weights ``[F, hidden]`` whose
    rows may lie any distance apart. Raises ``ValueError`` for a spec that ``supports`` refuses, and at the call for
    other rows, shapes, dtypes or layouts than the spec says.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    dtype = DTYPES[spec.dtype]
    entry = compile_source(source(spec))

    def call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        m, h = rows.shape
        if m > spec.rows:
            raise ValueError(f"the kernel was generated for at most {spec.rows} rows; found {m}")
        if rows.dtype != dtype:
            raise ValueError(f"the kernel takes x in {spec.dtype}; found {rows.dtype}")
        for weight in (gate, up, down):
            if weight.dtype != dtype or weight.shape != (gate.shape[0], h) or weight.stride(1) != 1:
                raise ValueError(
                    f"the kernel reads {spec.dtype} gate, up and transposed down [F, {h}] with contiguous rows; found "
                    f"{weight.dtype} {list(weight.shape)} with strides {weight.stride()}"
                )
        lists, length = 0, 0
        if neurons is not None:
            if neurons.dtype != torch.int32 or neurons.dim() != 2 or neurons.shape[0] not in (1, m):
                raise ValueError(
                    f"lists of neurons are int32 [1 or {m}, K]; found {neurons.dtype} {list(neurons.shape)}"
                )
            neurons = neurons.contiguous()
            lists, length = neurons.shape
        y = torch.empty(x.shape, dtype=dtype)
        if m:
            entry(
                rows.data_ptr(), *rows.stride(), m, h,
                gate.data_ptr(), up.data_ptr(), down.data_ptr(), gate.stride(0), up.stride(0), down.stride(0),
                gate.shape[0], 0 if neurons is None else neurons.data_ptr(), lists, length, y.data_ptr(),
            )  # fmt: skip
        return y

    return call
