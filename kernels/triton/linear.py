"""Linear layers of a few rows in Triton: those of one input in one launch, every weight read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from torch import Tensor

from .. import fused_spec
from ..fused_spec import FusedSpec, Input, Output
from ..spec import DTYPES, LinearSpec
from .fused import LINEAR_CONFIGS, fused
from .fused_program import MAX_ROWS
from .source import TYPES

Linear = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], list[Tensor]]


def supports(spec: LinearSpec) -> str | None:
    """Why no Triton linear kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in TYPES:
        return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the Triton kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return None


def configs(spec: LinearSpec) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The launch choices worth a try, those of fused programs that read weights."""
    return LINEAR_CONFIGS


@lru_cache(maxsize=256)
def linear(spec: LinearSpec, **changes: int) -> Linear:
    """The kernel of ``spec``: ``reference.linear`` for at most ``spec.rows`` rows.

    ``call(x, weights, biases) -> [y, ...]``: x ``[..., K]`` of any strides, weights ``[N, K]`` contiguous, biases
    ``[N]`` or None, all of the spec's dtype; y ``[..., N]`` contiguous. One kernel per shape is compiled, at its first
    call. changes: of its ``FusedConfig``, by name. Raises ``ValueError`` for a spec that ``supports`` refuses and for x
    with too many rows.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_linear, spec, changes)


def _linear(
    spec: LinearSpec, changes: dict[str, int], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    k = x.shape[-1]
    rows = x.numel() // max(k, 1)
    if rows > spec.rows:
        raise ValueError(f"the kernel was generated for at most {spec.rows} rows; found {rows}")
    widths = tuple(weight.shape[0] for weight in weights)
    if not rows:
        return [x.new_empty((*x.shape[:-1], n)) for n in widths]
    biased = tuple(bias is not None for bias in biases)
    program = fused(_program(spec.dtype, rows, k, widths, biased), **changes)
    results = program([x.to(DTYPES[spec.dtype]), *weights, *(bias for bias in biases if bias is not None)])
    return [y.view(*x.shape[:-1], n) for y, n in zip(results, widths, strict=True)]


@lru_cache(maxsize=1024)
def _program(dtype: str, rows: int, k: int, widths: tuple[int, ...], biased: tuple[bool, ...]) -> FusedSpec:
    """Layers of one input as a fused program: they do not wait for one another, so it is one launch."""
    inputs = [Input("rows", (rows, k)), *(Input("weight", (n, k)) for n in widths)]
    steps = []
    for number, (n, bias) in enumerate(zip(widths, biased, strict=True), 1):
        steps.append(fused_spec.Linear(0, number, len(inputs) if bias else None))
        if bias:
            inputs.append(Input("vector", (n,)))
    outputs = tuple(Output(len(inputs) + i, (rows, n)) for i, n in enumerate(widths))
    return FusedSpec(dtype, rows, tuple(inputs), tuple(steps), outputs)
