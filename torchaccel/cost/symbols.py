"""The symbols in which work is expressed, and their values for a call."""

from __future__ import annotations

from typing import Any

import sympy

from ..kernels.spec import DTYPES, AttentionSpec
from .shape import AttentionShape, LinearShape

# Attention: batch rows, query heads, KV heads, new tokens, stored tokens, head dimension (keys' and values' mean),
# share of the (query, key) pairs that is read, bits of a stored number with its share of scales, bytes of a number in
# full precision, tokens of the full-precision tail, numbers that correct codes for each of them, outliers of a
# group, latents of which a head's keys and values are rebuilt. P: processors.
B, H_q, H_kv, S_q, S_kv, D, density, bits, width, tail, corrections, outliers, latents, P = sympy.symbols(
    "B H_q H_kv S_q S_kv D density bits width tail corrections outliers latents P", positive=True
)
# Linear layers: rows of x, its width, the results' widths together, how many matrices; density: the share of the
# weights that is read.
M, K, N, matrices = sympy.symbols("M K N matrices", positive=True)

ATTENTION: tuple[Any, ...] = (
    B, H_q, H_kv, S_q, S_kv, D, density, bits, width, tail, corrections, outliers, latents, P
)  # fmt: skip
LINEAR: tuple[Any, ...] = (M, K, N, matrices, width, density, P)


def attention_values(spec: AttentionSpec, shape: AttentionShape, processors: int) -> tuple[float, ...]:
    """The values of ``ATTENTION``, in order."""
    keys, values = spec.key_format, spec.value_format
    dim = (keys.head_dim + values.head_dim) / 2
    size = DTYPES[spec.dtype].itemsize
    # On average half of a block waits in the tail for the rest.
    waiting = max((fmt.window + fmt.block / 2 for fmt in (keys, values) if fmt.is_blocked), default=0.0)
    stored = 8 * (keys.token_bytes + values.token_bytes) / (2 * dim)
    corrected = (keys.corrections + values.corrections) / 2
    extremes = (keys.outliers + values.outliers) / 2
    rebuilt = shape.kv_heads * sum(fmt.rank for fmt in (keys, values) if fmt.kind == "latent")
    seen = visible_share(spec, shape)
    heads = shape.kv_heads * spec.group
    return (
        shape.batch, heads, shape.kv_heads, shape.queries, shape.tokens, dim, seen, stored, size, waiting, corrected,
        extremes, rebuilt, processors,
    )  # fmt: skip


def linear_values(width_: int, shape: LinearShape, processors: int) -> tuple[float, ...]:
    """The values of ``LINEAR``, in order; ``width_`` is the bytes of a number."""
    return shape.rows, shape.inputs, sum(shape.outputs), len(shape.outputs), width_, shape.density, processors


def visible_share(spec: AttentionSpec, shape: AttentionShape) -> float:
    """Share of the ``queries x tokens`` pairs that the spec's causal mask and window let a kernel read."""
    if shape.density is not None:
        return min(1.0, shape.density + shape.listed / max(1, shape.tokens))
    pairs = visible_pairs(shape.queries, shape.tokens, spec.causal, spec.window, spec.sinks)
    if spec.head_windows and spec.window is not None:
        # Which heads is data: thought to be half of them, as those who publish such models have it.
        pairs = (pairs + visible_pairs(shape.queries, shape.tokens, spec.causal, None, 0)) / 2
    return pairs / (shape.queries * shape.tokens)


def visible_pairs(queries: int, tokens: int, causal: bool, window: int | None, sinks: int) -> float:
    """(query, key) pairs that are read by the last ``queries`` of ``tokens`` columns."""
    if not causal and window is None:
        return float(queries * tokens)

    def up_to(count: int) -> float:
        """Pairs of the first ``count`` columns, each seeing itself and what is before it within its window."""
        seen = count if window is None else min(count, window + sinks)
        return seen * (seen + 1) / 2 + (count - seen) * seen

    return up_to(tokens) - up_to(tokens - queries)
