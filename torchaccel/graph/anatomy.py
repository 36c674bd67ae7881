"""The parts of a transformer graph: phase, layers, attention sites, caches, logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from . import canonical
from .caches import CacheKind, CacheSite, find_cache
from .embedding import find_token_ids
from .layers import LayerSpan, find_layers, module_path
from .nodes import (
    CASTS,
    Size,
    ancestors,
    argument,
    arguments,
    descendants,
    is_number,
    op_name,
    output_nodes,
    rank,
    shape,
)
from .streams import PROJECTIONS

__all__ = ["Anatomy", "AttentionSite", "CacheKind", "CacheSite", "Layer", "LogitsSite", "Phase", "analyze"]

Phase = Literal["prefill", "extend", "decode", "encoder", "unknown"]


@dataclass(frozen=True)
class AttentionSite:
    """One canonical attention node and what it works on.

    name: path of the module it was traced in ("model.layers.0.self_attn"), or the node's name. q: ``[B, H, Q, D]``.
    k, v: ``[B, H_kv, K, D]``, what attention reads, past included. mask: broadcastable to ``[B, H, Q, K]``, bool (True
    is seen) or additive, or None. scale, causal, softcap: as of ``canonical.attention``. dtype: of q.
    layer: index into ``Anatomy.layers``, or None when layers are unknown.
    """

    index: int
    name: str
    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float
    causal: bool
    softcap: float | None
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    key_cache: CacheSite
    value_cache: CacheSite
    layer: int | None


@dataclass(frozen=True)
class Layer:
    """One decoder or encoder layer.

    input, output: nodes of the residual stream ``[B, N, d]``; replacing every use of ``output`` by ``input`` skips
    exactly this layer. attention: its (self-)attention, None for a layer without. nodes: all that the layer computes.
    """

    index: int
    name: str
    input: Node
    output: Node
    attention: AttentionSite | None
    nodes: frozenset[Node] = field(repr=False)


@dataclass(frozen=True)
class LogitsSite:
    """The language-model head.

    node: the logits the graph returns ``[B, M, V]``. head: the projection onto the vocabulary. hidden: the final hidden
    states ``[B, N, d]`` of all tokens. last_only: whether the head sees ``hidden[:, -1:]`` alone (M == 1).
    """

    node: Node
    hidden: Node
    last_only: bool
    head: Node


@dataclass(frozen=True)
class Anatomy:
    """Everything a rewrite needs to know about a graph; valid until the graph is changed.

    phase: "prefill" (several tokens on an empty cache, or a causal model without one), "extend" (several tokens on a
    cache; also a prefill into a StaticCache that already has buffers, since its length is data), "decode" (one token on
    a cache), "encoder" (no cache, not causal), "unknown" (no attention). attentions: in graph order. layers: in graph
    order, empty when not understood.
    batch, query_length: B and Q of the first attention, ints or SymInts; 0 without attention. ids: the call's token ids
    int64 ``[B, N]``, None where the graph is given embeddings.
    """

    phase: Phase
    attentions: list[AttentionSite]
    layers: list[Layer]
    logits: LogitsSite | None
    batch: Size
    query_length: Size
    ids: Node | None = None


def analyze(module: GraphModule | Graph) -> Anatomy:
    """Anatomy of a graph whose attention is canonical; reads only, adds no guard."""
    graph = module.graph if isinstance(module, GraphModule) else module
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is canonical.attention]
    spans = find_layers(graph, nodes)
    outputs = set(output_nodes(graph))
    sites = [_site(index, node, spans, outputs) for index, node in enumerate(nodes)]
    layers = [_layer(index, span, sites) for index, span in enumerate(spans)]
    batch, _, queries, _ = shape(sites[0].q) or (0, 0, 0, 0) if sites else (0, 0, 0, 0)
    logits = _find_logits(graph, sites, layers)
    ids = find_token_ids(sites[-1].q, None if logits is None else logits.node) if sites else None
    return Anatomy(_phase(sites), sites, layers, logits, batch, queries, ids)


def _site(index: int, node: Node, spans: list[LayerSpan], outputs: set[Node]) -> AttentionSite:
    """One attention with its caches."""
    q, k, v = arguments(node)[:3]
    options: dict[str, Any] = dict(node.kwargs)
    value = q.meta["example_value"]
    layer = next((i for i, span in enumerate(spans) if node in span.attentions), None)
    return AttentionSite(
        index=index,
        name=(module_path(node) or [node.name])[-1],
        node=node,
        q=q,
        k=k,
        v=v,
        mask=argument(node, 3, "mask"),
        scale=options["scale"],
        causal=options["causal"],
        softcap=options.get("softcap"),
        heads=value.shape[1],
        kv_heads=k.meta["example_value"].shape[1],
        head_dim=value.shape[3],
        dtype=value.dtype,
        key_cache=find_cache(k, q, outputs),
        value_cache=find_cache(v, q, outputs),
        layer=layer,
    )


def _layer(index: int, span: LayerSpan, sites: list[AttentionSite]) -> Layer:
    own = [site for site in sites if site.layer == index]
    attention = next((site for site in own if site.key_cache.kind != "cross"), None)
    return Layer(index, span.name, span.input, span.output, attention, span.nodes)


def _phase(sites: list[AttentionSite]) -> Phase:
    """Phase of a graph from its self-attentions."""
    own = [site for site in sites if site.key_cache.kind != "cross"] or sites
    if not own:
        return "unknown"
    caches = [cache for site in own for cache in (site.key_cache, site.value_cache)]
    queries = (shape(own[0].q) or (0, 0, 0))[2]
    if any(cache.past is not None or cache.kind == "unknown" for cache in caches):
        return "decode" if isinstance(queries, int) and queries == 1 else "extend"
    if any(cache.stored is not None or cache.write is not None for cache in caches):
        return "prefill"
    return "prefill" if any(site.causal or _is_triangular(site.mask) for site in own) else "encoder"


def _is_triangular(mask: Node | None) -> bool:
    """Whether a mask is made by comparing positions with positions."""
    for node in ancestors([mask]) if mask is not None else ():
        name = op_name(node)
        if name in ("tril", "triu", "tril_", "triu_"):
            return True
        if name in ("le", "lt", "ge", "gt") and all(isinstance(side, Node) for side in node.args[:2]):
            return True
    return False


def _find_logits(graph: Graph, sites: list[AttentionSite], layers: list[Layer]) -> LogitsSite | None:
    """The head behind the graph's rank-3 output, past softcaps and casts."""
    if not sites:
        return None
    inside = {node for layer in layers for node in layer.nodes}
    after = descendants([sites[-1].node])
    for output in output_nodes(graph):
        if output not in after or rank(output) != 3 or output in inside:
            continue
        head = _past_cap(output)
        if op_name(head) not in PROJECTIONS or head in inside:
            continue
        hidden = next((node for node in head.all_input_nodes if node in after), None)
        if hidden is None:
            continue
        whole, last_only = _before_slice(hidden)
        return LogitsSite(output, whole, last_only, head)
    return None


def _past_cap(node: Node) -> Node:
    """What logits were before casts, scales and a softcap."""
    while op_name(node) in CASTS | {"tanh", "mul", "div", "contiguous"}:
        tensors = [source for source in node.args[:2] if isinstance(source, Node)]
        others = [source for source in node.args[:2] if not isinstance(source, Node)]
        if len(tensors) != 1 or (op_name(node) in ("mul", "div") and not all(is_number(x) for x in others)):
            return node
        node = tensors[0]
    return node


def _before_slice(hidden: Node) -> tuple[Node, bool]:
    """Hidden states before ``hidden[:, -1:, :]`` and whether they were cut to the last token."""
    if op_name(hidden) == "getitem" and isinstance(arguments(hidden)[1], tuple):
        everything = slice(None, None, None)
        batch, cut, *rest = (*arguments(hidden)[1], everything, everything)[:3]
        if batch == everything and all(part == everything for part in rest):
            if cut == slice(-1, None, None):
                return arguments(hidden)[0], True
            if cut in (slice(0, None, None), everything):
                return arguments(hidden)[0], False
    return hidden, False
