"""Decoder and encoder layers of a graph: by module names, else by the shape of the residual stream."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

import networkx as nx
from torch.fx import Graph, Node

from .nodes import ancestors, arguments, descendants, dtype, op_name, positions, rank, same_shape
from .streams import RESHAPES, STREAM, stream_back


@dataclass(frozen=True)
class LayerSpan:
    """One layer between two points of the residual stream.

    name: module path ("model.layers.3"), or "layers.3" where modules are unknown. input, output: ``[B, N, d]`` nodes;
    replacing every use of ``output`` by ``input`` skips this layer. nodes: what the layer computes, output included.
    attentions: the attention nodes in it, in graph order.
    """

    name: str
    input: Node
    output: Node
    nodes: frozenset[Node] = field(repr=False)
    attentions: tuple[Node, ...]


def module_path(node: Node) -> list[str]:
    """Module paths a node was traced in, outermost first, without the name of the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (re.sub(r"\[(\d+)\]", r".\1", str(path)) for path, _ in stack.values())
    return [re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path) for path in paths]


def find_layers(graph: Graph, attentions: list[Node]) -> list[LayerSpan]:
    """Layers of a graph in order; empty when its residual stream is not understood."""
    if not attentions:
        return []
    return _layers_by_module(graph, attentions) or _layers_by_structure(graph, attentions)


def _layers_by_module(graph: Graph, attentions: list[Node]) -> list[LayerSpan]:
    """One layer per entry of the module lists that hold the attentions; empty when the names do not fit the graph."""
    own_paths = [(module_path(node) or [""])[-1] for node in attentions]
    if len(set(own_paths)) != len(own_paths) or not all(own_paths):
        return []  # one module called several times: names cannot tell its calls apart
    entries: dict[str, set[str]] = defaultdict(set)
    for path in own_paths:
        for holder, entry in _list_entries(path):
            entries[holder].add(entry)
    groups: dict[str, set[Node]] = {}
    chosen = set()
    for path in own_paths:
        candidates = _list_entries(path)
        if not candidates:
            return []
        chosen.add(next((h for h, _ in candidates if len(entries[h]) > 1), candidates[0][0]))
    for node in graph.nodes:
        for path in module_path(node):
            holder, _, last = path.rpartition(".")
            if holder in chosen and last.isdigit():
                groups.setdefault(path, set()).add(node)
    order = positions(graph)
    layers = [_span_of(name, nodes, attentions, order) for name, nodes in groups.items()]
    return [layer for layer in layers if layer] if all(layers) else []


def _list_entries(path: str) -> list[tuple[str, str]]:
    """``(list, entry)`` for each module-list entry on a path: "a.layers.0.b" -> [("a.layers", "a.layers.0")]."""
    parts = path.split(".")
    cuts = [i for i, part in enumerate(parts) if part.isdigit()]
    return [(".".join(parts[:i]), ".".join(parts[: i + 1])) for i in cuts]


def _span_of(name: str, nodes: set[Node], attentions: list[Node], order: dict[Node, int]) -> LayerSpan | None:
    """The stream nodes before and after a set of nodes, or None."""
    leaving = [node for node in nodes if rank(node) and any(user not in nodes for user in node.users)]
    for output in sorted(leaving, key=order.__getitem__, reverse=True):
        reached = stream_back([output], stop=lambda node: node not in nodes)
        entering = [node for node in reached if node not in nodes and same_shape(node, output)]
        entering = [node for node in entering if dtype(node) == dtype(output)]
        if entering:
            inside = tuple(node for node in attentions if node in nodes)
            start = max(entering, key=order.__getitem__)
            return LayerSpan(name, start, output, frozenset(nodes), inside)
    return None


def _layers_by_structure(graph: Graph, attentions: list[Node]) -> list[LayerSpan]:
    """One layer per attention: between the points of the stream that every path from one attention on must cross."""
    order = positions(graph)
    sink = _sink(graph, attentions[-1], order)
    if sink is None:
        return []
    upstream = ancestors([sink])
    attentions = [node for node in attentions if node in upstream]
    reverse = nx.DiGraph((user, node) for node in upstream for user in node.users if user in upstream)
    nearest = nx.immediate_dominators(reverse, sink)
    crossings = [_chain(nearest, node) for node in attentions]
    outputs: list[Node] = []
    for after, following in zip(crossings, attentions[1:], strict=False):
        before_next = ancestors([following])
        common = [node for node in after if node in before_next and op_name(node) in STREAM]
        if not common:
            return []  # two attentions side by side, or of different sequences
        outputs.append(max(common, key=order.__getitem__))
    last = _last_output(crossings[-1], outputs)
    if last is None:
        return []
    outputs.append(last)
    layers = []
    for i, (end, attention) in enumerate(zip(outputs, attentions, strict=True)):
        before = ancestors([attention])
        reached = stream_back([end], stop=set(outputs[:i]).__contains__)
        entering = [node for node in reached if node in before and same_shape(node, end)]
        if not entering:
            return []
        start = max(entering, key=order.__getitem__)
        inside = (descendants([start]) - {start} - descendants([end])) | {end}
        layers.append(LayerSpan(f"layers.{i}", start, end, frozenset(inside), (attention,)))
    return layers


def _sink(graph: Graph, attention: Node, order: dict[Node, int]) -> Node | None:
    """The last thing the graph returns that depends on its last attention."""
    after = descendants([attention])
    ends = [node for node in graph.output_node().all_input_nodes if node in after]
    return max(ends, key=order.__getitem__, default=None)


def _chain(nearest: dict[Node, Node | None], node: Node) -> list[Node]:
    """What every path from a node to the sink crosses, nearest first."""
    found: list[Node] = []
    while True:
        following = nearest.get(node)
        if following is None or following is node:
            return found
        found.append(following)
        node = following


def _last_output(crossing: list[Node], outputs: list[Node]) -> Node | None:
    """End of the last layer: its last residual add, followed by the same operators as in the layers before it."""
    adds = [i for i, node in enumerate(crossing) if _joins_stream(node, crossing)]
    if not adds:
        return None
    place = adds[-1]
    tail: list[str | None] = []
    if outputs:
        node = outputs[-1]
        while op_name(node) not in ("add", "add_") and arguments(node) and isinstance(arguments(node)[0], Node):
            tail.insert(0, op_name(node))
            node = arguments(node)[0]
    else:
        following = crossing[place + 1 : place + 2]
        tail = [op_name(node) for node in following if op_name(node) in RESHAPES and rank(node) == 3]
    ops = [op_name(node) for node in crossing[place + 1 : place + 1 + len(tail)]]
    return crossing[place + len(tail)] if ops == tail else None


def _joins_stream(node: Node, crossing: list[Node]) -> bool:
    """Whether a node adds two tensors of its own shape, at least one of them after the attention."""
    if op_name(node) not in ("add", "add_"):
        return False
    terms = [term for term in arguments(node)[:2] if isinstance(term, Node) and same_shape(term, node)]
    return len(terms) == 2 and crossing[0] in ancestors(terms)
