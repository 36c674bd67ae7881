"""Generated C++ for linear layers of a few rows by inputs: rows of weights whose input is small are not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..sparse_spec import ThresholdLinearSpec
from ..spec import DTYPES
from .compile import Entry, compile_source, missing_toolchain, render
from .formats import C_TYPES
from .linear import MAX_ROWS

ThresholdLinear = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], list[Tensor]]


def supports(spec: ThresholdLinearSpec) -> str | None:
    """Why no C++ kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the C++ kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return missing_toolchain()


def source(spec: ThresholdLinearSpec, count: int) -> str:
    """The C++ source of the kernel of ``spec`` for ``count`` weights that share x; equal input gives equal text."""
    return render(
        "threshold_linear.cpp.jinja",
        spec=f"dtype {spec.dtype}, at most {spec.rows} rows, {'with' if spec.bias else 'without'} bias",
        fields=("x, x_row, x_column, M, K", *(f"w{i}, b{i}, t{i}, t{i}_k, y{i}, n{i}" for i in range(count))),
        dtype=C_TYPES[spec.dtype],
        rows=spec.rows,
        count=count,
        streams=0,
    )


@lru_cache(maxsize=256)
def _kernel(spec: ThresholdLinearSpec, count: int) -> Entry:
    return compile_source(source(spec, count))


@lru_cache(maxsize=256)
def threshold_linear(spec: ThresholdLinearSpec) -> ThresholdLinear:
    """The compiled kernel of ``spec``: ``sparse_reference.threshold_linear`` for at most ``spec.rows`` rows.

    ``call(x, weights, biases, thresholds) -> [y, ...]``: x ``[..., K]`` of any strides, weights ``[K, N]`` contiguous,
    biases ``[N]`` or None, thresholds float32 ``[1]`` or ``[K]``; y ``[..., N]`` contiguous. One kernel per number of
    weights is compiled, at its first call. Raises ``ValueError`` for a spec that ``supports`` refuses, and at the call
    for other rows, shapes, dtypes or layouts than the spec says.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    dtype = DTYPES[spec.dtype]

    def call(
        x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
    ) -> list[Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        m, k = rows.shape
        if m > spec.rows:
            raise ValueError(f"the kernel was generated for at most {spec.rows} rows; found {m}")
        if rows.dtype != dtype:
            raise ValueError(f"the kernel takes x in {spec.dtype}; found {rows.dtype}")
        args, results = [rows.data_ptr(), *rows.stride(), m, k], []
        for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
            if weight.dtype != dtype or weight.shape[0] != k or not weight.is_contiguous():
                raise ValueError(
                    f"the kernel reads contiguous {spec.dtype} weights [{k}, N]; found {weight.dtype} "
                    f"{list(weight.shape)} with strides {weight.stride()}"
                )
            if bias is not None and not (spec.bias and bias.dtype == dtype and bias.is_contiguous()):
                raise ValueError(
                    f"the kernel was generated for bias={spec.bias} in {spec.dtype}; found a bias in {bias.dtype}"
                )
            if threshold.dtype != torch.float32 or threshold.shape not in ((1,), (k,)):
                raise ValueError(
                    f"thresholds are float32 [1] or [{k}]; found {threshold.dtype} {list(threshold.shape)}"
                )
            y = torch.empty((*x.shape[:-1], weight.shape[1]), dtype=dtype)
            step = threshold.stride(0) if threshold.shape[0] > 1 else 0
            args += (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), threshold.data_ptr(), step)
            args += (y.data_ptr(), weight.shape[1])
            results.append(y)
        if m:
            _kernel(spec, len(results))(*args)
        return results

    return call
