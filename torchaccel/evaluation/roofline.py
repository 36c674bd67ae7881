"""The floor of a variant: the least time its own bytes and FLOPs take at the rates this machine was measured to reach.

``options`` are canonical here: family -> {"method": name, every parameter}, as ``torchaccel.options`` resolves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cost.model import ModelSizes
from ..cost.traffic import Methods, Traffic
from ..kernels.spec import DTYPES
from .machine import Machine
from .models import ModelFacts


@dataclass(frozen=True)
class Work:
    """Matrix weights (elements) that a token reads: in each decoder layer, and outside the layers (the head)."""

    facts: ModelFacts
    layer_weights: int
    other_weights: int

    @staticmethod
    def of(model: Any, facts: ModelFacts) -> Work | None:
        """The work of a dense decoder; None for experts, of which a token reads a part, and for encoders."""
        try:
            sizes = ModelSizes.of(model)
        except ValueError:
            return None
        return Work(facts, sizes.layer_weights, sizes.other_weights)


def decode_floor(work: Work, options: Methods, machine: Machine, *, batch: int, context: int) -> float | None:
    """Floor of one decode step in milliseconds; None when ``options`` holds a method whose traffic is not modelled.

    Every weight is read once per step, every visible key and value once per row of the batch.
    """
    if Traffic(options).unknown:
        return None
    facts = work.facts
    layers = Traffic(options).decode_layers(facts.layers)
    size = DTYPES[facts.dtype].itemsize
    weights = work.layer_weights * layers + work.other_weights
    visible, read = _read_on_average(facts, options, context)
    kv = batch * layers * facts.kv_heads * read
    attention = 4.0 * batch * layers * facts.heads * facts.head_dim * visible
    return _milliseconds(machine, facts.dtype, weights * size + kv, 2.0 * batch * weights + attention)


def prefill_floor(work: Work, options: Methods, machine: Machine, *, batch: int, context: int) -> float | None:
    """Floor of one prompt in milliseconds (logits of the last token only); None as for ``decode_floor``."""
    if Traffic(options).unknown:
        return None
    facts = work.facts
    flops = 2.0 * batch * work.other_weights
    for tokens, layers in Traffic(options).prompt_lengths(facts.layers, context):
        pairs = Traffic(options).visible_pairs(tokens)
        flops += layers * batch * (2.0 * tokens * work.layer_weights + 4.0 * facts.heads * facts.head_dim * pairs)
    return _milliseconds(machine, facts.dtype, facts.weight_bytes, flops)


def attention_floor(
    facts: ModelFacts, options: Methods, machine: Machine, *, batch: int, context: int, decode: bool
) -> float | None:
    """Floor of one layer's attention alone in milliseconds; None as for ``decode_floor``."""
    if Traffic(options).unknown:
        return None
    if decode:
        pairs, read = _read(facts, options, context)
        size = facts.kv_heads * read
    else:
        # Queries, keys and values are read, the result is written.
        size = 2.0 * (facts.heads + facts.kv_heads) * context * facts.head_dim * DTYPES[facts.dtype].itemsize
        pairs = float(Traffic(options).visible_pairs(context))
    return _milliseconds(machine, facts.dtype, batch * size, 4.0 * batch * facts.heads * facts.head_dim * pairs)


def density(context: int, options: Methods, *, decode: bool) -> float | None:
    """Fraction of the causal keys a window-and-sinks method visits; None for dense attention and unknown geometry."""
    if Traffic(options).window[0] is None:
        return None
    if decode:
        return Traffic(options).visible(context + 1) / (context + 1)
    return Traffic(options).visible_pairs(context) / Traffic({}).visible_pairs(context)


def _read(facts: ModelFacts, options: Methods, context: int, *, treated: bool = True) -> tuple[float, float]:
    """Tokens that a decode step reads: what is stored of the context, as far as attention sees it, and its own, and
    their bytes in one head.

    What a method chooses them by counts as tokens, too. treated: as ``Traffic.depths`` has it.
    """
    traffic = Traffic(options)
    parts = traffic.parts(context, facts.dtype, facts.head_dim, facts.kv_heads, facts.layers, treated)
    stored = sum(part.tokens for part in parts)
    lists = traffic.retrieving if treated else None
    visible = float(traffic.visible(round(stored) + 1)) if lists is None else lists.read(round(stored) + 1)
    return visible, visible * sum(part.tokens * part.token_bytes for part in parts) / stored


def _read_on_average(facts: ModelFacts, options: Methods, context: int) -> tuple[float, float]:
    """As ``_read``, over all layers, of which a method may leave the first ones dense."""
    lists = Traffic(options).retrieving
    dense = 0.0 if lists is None else min(lists.dense, facts.layers) / facts.layers
    treated, rest = (_read(facts, options, context, treated=which) for which in (True, False))
    return treated[0] + (rest[0] - treated[0]) * dense, treated[1] + (rest[1] - treated[1]) * dense


def _milliseconds(machine: Machine, dtype: str, size: float, flops: float) -> float:
    rate = machine.gemm_gflops.get(dtype) or max(machine.gemm_gflops.values())
    return max(size / (machine.read_gbs * 1e6), flops / (rate * 1e6))
