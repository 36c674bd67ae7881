"""Linear layers of a few rows by inputs in Triton: rows of weights whose input is small are not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..sparse_spec import ThresholdLinearSpec
from ..spec import DTYPES
from .row_sums import COLUMNS, MAX_ROWS, ROWS_SUMMED, splits_of, total
from .source import TYPES, load, render_text
from .tiles import PRECISION, device_facts

ThresholdLinear = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], list[Tensor]]

WARPS, STAGES = 4, 3


def supports(spec: ThresholdLinearSpec) -> str | None:
    """Why no Triton kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in TYPES:
        return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the Triton kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return None


@lru_cache(maxsize=64)
def generate(spec: ThresholdLinearSpec) -> str:
    """Triton source of ``spec``: ``collect`` and ``total``."""
    return render_text("threshold_linear.py.jinja", spec=f"dtype {spec.dtype}", dtype=TYPES[spec.dtype], rows=MAX_ROWS)


@lru_cache(maxsize=256)
def threshold_linear(spec: ThresholdLinearSpec) -> ThresholdLinear:
    """The kernels of ``spec``: ``sparse_reference.threshold_linear`` for at most ``spec.rows`` rows.

    ``call(x, weights, biases, thresholds) -> [y, ...]``: x ``[..., K]`` of any strides, weights ``[K, N]`` contiguous,
    biases ``[N]`` or None, thresholds float32 ``[1]`` or ``[K]``; y ``[..., N]`` contiguous. Two launches for each
    weight. Raises ``ValueError`` for a spec that ``supports`` refuses, and at the call for other rows, shapes, dtypes
    or layouts than the spec says.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_threshold_linear, spec)


def _threshold_linear(
    spec: ThresholdLinearSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] > spec.rows or rows.dtype != DTYPES[spec.dtype]:
        raise ValueError(
            f"the kernel takes at most {spec.rows} rows in {spec.dtype}; found {rows.shape[0]} in {rows.dtype}"
        )
    layers = zip(weights, biases, thresholds, strict=True)
    return [_layer(spec, rows, *layer).view(*x.shape[:-1], layer[0].shape[1]) for layer in layers]


def _layer(spec: ThresholdLinearSpec, rows: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    (m, k), n = rows.shape, weight.shape[1]
    if weight.dtype != rows.dtype or weight.shape[0] != k or not weight.is_contiguous():
        raise ValueError(
            f"the kernel reads contiguous {spec.dtype} weights [{k}, N]; found {weight.dtype} "
            f"{list(weight.shape)} with strides {weight.stride()}"
        )
    if threshold.dtype != torch.float32 or threshold.shape not in ((1,), (k,)):
        raise ValueError(f"thresholds are float32 [1] or [{k}]; found {threshold.dtype} {list(threshold.shape)}")
    y = rows.new_empty(m, n)
    if not m:
        return y
    splits, each = splits_of(k, n, rows.device)
    sums = torch.empty(splits, m, n, dtype=torch.float32, device=rows.device)
    module = load(generate(spec), "threshold_linear")
    with torch.cuda.device_of(rows):
        module.collect[(-(-n // COLUMNS), splits)](
            rows, threshold.contiguous(), weight, sums, k, each, M=m, N=n, EACH_HAS=threshold.shape[0] > 1,
            BI=ROWS_SUMMED, BC=COLUMNS, PRECISION=PRECISION[device_facts(rows.device)[0]],
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        total(module, sums, bias, y)
    return y
