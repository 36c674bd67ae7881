"""Generated C++ for linear layers of a few rows: every weight is read once, at memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..spec import DTYPES, LinearSpec
from .compile import Entry, compile_source, missing_toolchain, render
from .formats import C_TYPES

Linear = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], list[Tensor]]

MAX_ROWS = 8
# Of weights, below which a second thread is not woken.
GRAIN_KIB = 64


def supports(spec: LinearSpec) -> str | None:
    """Why no C++ linear kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the C++ kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return missing_toolchain()


def configs(spec: LinearSpec) -> Iterator[tuple[tuple[str, int], ...]]:
    """The free choices, the seed first: rows of W read together (``streams``), bytes a thread is woken for."""
    yield ()
    yield (("streams", other_streams(spec.rows)),)
    yield (("grain_kib", 4 * GRAIN_KIB),)


def other_streams(rows: int) -> int:
    """What the seed does not do: one row of W at a time for few rows of x, several for more."""
    return 4 if rows <= 2 else 1


def source(spec: LinearSpec, count: int, streams: int = 0, grain_kib: int = GRAIN_KIB) -> str:
    """The C++ source of the kernel of ``spec`` for ``count`` weights that share x; equal input gives equal text."""
    return render(
        "linear.cpp.jinja",
        title="torchaccel linear layers of a few rows",
        spec=f"dtype {spec.dtype}, at most {spec.rows} rows, {'with' if spec.bias else 'without'} bias",
        fields=("x, x_row, x_column, M, K", *(f"w{i}, b{i}, y{i}, n{i}" for i in range(count))),
        dtype=C_TYPES[spec.dtype],
        rows=spec.rows,
        count=count,
        bias="true" if spec.bias else "false",
        streams=streams,
        grain_kib=grain_kib,
    )


@lru_cache(maxsize=256)
def _kernel(spec: LinearSpec, count: int, streams: int, grain_kib: int) -> Entry:
    return compile_source(source(spec, count, streams, grain_kib))


@lru_cache(maxsize=256)
def linear(spec: LinearSpec, streams: int = 0, grain_kib: int = GRAIN_KIB) -> Linear:
    """The compiled kernel of ``spec``: ``reference.linear`` for at most ``spec.rows`` rows.

    streams, grain_kib: see ``configs``; 0 streams are as many as suit the registers.

    ``call(x, weights, biases) -> [y, ...]``: x ``[..., K]`` of any strides, weights ``[N, K]`` contiguous, biases
    ``[N]`` or None, all of the spec's dtype; y ``[..., N]`` contiguous. One kernel per number of weights is compiled,
    at its first call. Raises ``ValueError`` for a spec that ``supports`` refuses and for x with too many rows.
    """
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    dtype, rows, bias = DTYPES[spec.dtype], spec.rows, spec.bias
    empty = torch.empty

    def call(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        shape = x.shape
        k = shape[-1]
        m = x.numel() // k if k else 0
        if m > rows:
            raise ValueError(f"the kernel was generated for at most {rows} rows; found {m}")
        flat = x if x.dim() == 2 else x.reshape(m, k)
        if flat.dtype != dtype:
            flat = flat.to(dtype)
        args = [flat.data_ptr(), *flat.stride(), m, k]
        result = []
        for weight, b in zip(weights, biases, strict=True):
            n = weight.shape[0]
            if weight.dtype != dtype or weight.shape[1] != k or not weight.is_contiguous():
                raise ValueError(
                    f"the kernel reads contiguous {spec.dtype} weights [N, {k}]; found {weight.dtype} "
                    f"{list(weight.shape)} with strides {weight.stride()}"
                )
            if b is not None and not (bias and b.dtype == dtype and b.is_contiguous()):
                raise ValueError(f"the kernel was generated for bias={bias} in {spec.dtype}; found a bias in {b.dtype}")
            y = empty((*shape[:-1], n), dtype=dtype)
            args += (weight.data_ptr(), 0 if b is None else b.data_ptr(), y.data_ptr(), n)
            result.append(y)
        if m:
            _kernel(spec, len(result), streams, grain_kib)(*args)
        return result

    return call
