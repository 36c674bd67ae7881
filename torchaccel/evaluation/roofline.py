"""The floor of a variant: the least time its own bytes and FLOPs take at the rates this machine was measured to reach.

``options`` are canonical here: family -> {"method": name, every parameter}, as ``torchaccel.options`` resolves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.spec import DTYPES, KVFormat
from ..passes.layer_skipping.unified import executed_layers
from .machine import Machine
from .models import ModelFacts, text_config

KNOWN_METHODS = {
    "layer_skipping": "unified",
    "token_pruning": "fastv",
    "kv_compression": "int8",
    "sparse_attention": "streaming_llm",
}


Methods = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Work:
    """Matrix weights (elements) that a token reads: in each decoder layer, and outside the layers (the head)."""

    facts: ModelFacts
    layer_weights: int
    other_weights: int

    @staticmethod
    def of(model: Any, facts: ModelFacts) -> Work | None:
        """The work of a dense decoder; None for experts, of which a token reads a part, and for encoders."""
        config = text_config(model)
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        # Looking a token up reads one row of the embedding; the head reads all of its matrix, shared with it or not.
        if model.get_output_embeddings() is None:
            return None
        head = model.get_output_embeddings().weight
        outside = {id(head), id(model.get_input_embeddings().weight)}
        layers = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in outside)
        return Work(facts, layers // facts.layers, head.numel())


def decode_floor(work: Work, options: Methods, machine: Machine, *, batch: int, context: int) -> float | None:
    """Floor of one decode step in milliseconds; None when ``options`` holds a method whose traffic is not modelled.

    Every weight is read once per step, every visible key and value once per row of the batch.
    """
    if not _modelled(options):
        return None
    facts = work.facts
    layers = _decode_layers(facts.layers, options)
    size = DTYPES[facts.dtype].itemsize
    weights = work.layer_weights * layers + work.other_weights
    kv = batch * layers * facts.kv_heads * _visible(context + 1, options) * _token_bytes(facts, options)
    attention = 4.0 * batch * layers * facts.heads * facts.head_dim * _visible(context + 1, options)
    return _milliseconds(machine, facts.dtype, weights * size + kv, 2.0 * batch * weights + attention)


def prefill_floor(work: Work, options: Methods, machine: Machine, *, batch: int, context: int) -> float | None:
    """Floor of one prompt in milliseconds (logits of the last token only); None as for ``decode_floor``."""
    if not _modelled(options):
        return None
    facts = work.facts
    flops = 2.0 * batch * work.other_weights
    for tokens, layers in _prompt_lengths(facts.layers, context, options):
        pairs = visible_pairs(tokens, options)
        flops += layers * batch * (2.0 * tokens * work.layer_weights + 4.0 * facts.heads * facts.head_dim * pairs)
    return _milliseconds(machine, facts.dtype, facts.weight_bytes, flops)


def attention_floor(
    facts: ModelFacts, options: Methods, machine: Machine, *, batch: int, context: int, decode: bool
) -> float | None:
    """Floor of one layer's attention alone in milliseconds; None as for ``decode_floor``."""
    if not _modelled(options):
        return None
    if decode:
        visible = _visible(context + 1, options)
        size = facts.kv_heads * visible * _token_bytes(facts, options)
        pairs = visible
    else:
        # Queries, keys and values are read, the result is written.
        size = 2.0 * (facts.heads + facts.kv_heads) * context * facts.head_dim * DTYPES[facts.dtype].itemsize
        pairs = visible_pairs(context, options)
    return _milliseconds(machine, facts.dtype, batch * size, 4.0 * batch * facts.heads * facts.head_dim * pairs)


def visible_pairs(tokens: int, options: Methods) -> int:
    """Number of (query, key) pairs that causal attention over ``tokens`` tokens computes."""
    method = options.get("sparse_attention")
    dense = tokens * (tokens + 1) // 2
    if method is None or "window" not in method:
        return dense
    seen = method["window"] + method["sinks"]
    return dense if tokens <= seen else seen * (seen + 1) // 2 + (tokens - seen) * seen


def density(context: int, options: Methods, *, decode: bool) -> float | None:
    """Fraction of the causal keys a window-and-sinks method visits; None for dense attention and unknown geometry."""
    method = options.get("sparse_attention")
    if method is None or "window" not in method:
        return None
    if decode:
        return _visible(context + 1, options) / (context + 1)
    return visible_pairs(context, options) / visible_pairs(context, {})


def _modelled(options: Methods) -> bool:
    asked = {family: options[family] for family in KNOWN_METHODS if family in options}
    return all(o["method"] == KNOWN_METHODS[family] and o.get("layers") is None for family, o in asked.items())


def _decode_layers(layers: int, options: Methods) -> int:
    method = options.get("layer_skipping")
    return layers if method is None else len(executed_layers(layers, method["target_speedup"]))


def _prompt_lengths(layers: int, context: int, options: Methods) -> list[tuple[int, int]]:
    """(tokens, layers) of the parts of the depth: token pruning shortens the later one."""
    method = options.get("token_pruning")
    if method is None:
        return [(context, layers)]
    first = min(method["layer"], layers)
    return [(context, first), (max(1, round(context * method["keep"])), layers - first)]


def _visible(context: int, options: Methods) -> int:
    method = options.get("sparse_attention")
    return context if method is None else min(context, method["window"] + method["sinks"])


def _token_bytes(facts: ModelFacts, options: Methods) -> float:
    """Bytes of one token's key and value in one head."""
    if options.get("kv_compression") is None:
        return 2.0 * facts.head_dim * DTYPES[facts.dtype].itemsize
    keys = KVFormat("int8", facts.dtype, facts.head_dim, "channel")
    values = KVFormat("int8", facts.dtype, facts.head_dim, "token")
    return keys.block_bytes / keys.block + values.block_bytes / values.block


def _milliseconds(machine: Machine, dtype: str, size: float, flops: float) -> float:
    rate = machine.gemm_gflops.get(dtype) or max(machine.gemm_gflops.values())
    return max(size / (machine.read_gbs * 1e6), flops / (rate * 1e6))
