"""The inputs and outputs of a graph while it is rewritten: buffers come in for cache tensors, side results go out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torchaccel.runtime.bindings import AppendBinding, Bindings, StoreBinding, TokenCount
from torchaccel.runtime.kv import LogicalKV, compress
from torchaccel.runtime.layout import Layout

from ..dead_code import remove_dead_code


class Signature:
    """Collects new placeholders, with an example input each, further results, and what becomes of the caches."""

    def __init__(self, graph: Graph, example_inputs: list[Any]):
        """example_inputs: of the graph as it was captured."""
        self.graph = graph
        self.examples = example_inputs
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        results: Any = graph.output_node().args[0]
        self.results: list[Any] = list(results)
        self.inputs: list[Any] = []
        self.appends: list[AppendBinding] = []
        self.stores: list[StoreBinding] = []
        self.shares: list[int] = []
        self._removed: set[int] = set()
        self._extra: list[Node] = []
        self._adopted: dict[Node, LogicalKV] = {}
        self._last_placeholder = self.placeholders[-1]

    def argument(self, node: Node) -> int:
        """The place of a placeholder among the graph's arguments."""
        return self.placeholders.index(node)

    def result(self, node: Node) -> int:
        """The place of a node among the graph's results."""
        return self.results.index(node)

    def remove(self, *results: int) -> None:
        """Let the graph no longer compute these of its results: whoever calls it makes them."""
        self._removed.update(results)

    def placeholder(self, name: str, example: Any) -> Node:
        """A new input behind the others."""
        with self.graph.inserting_after(self._last_placeholder):
            self._last_placeholder = self.graph.placeholder(name)
        self.inputs.append(example)
        return self._last_placeholder

    def buffer(self, past: Node, layout: Layout, name: str = "buf") -> Node:
        """A new input for an inner tensor of a cache tensor."""
        return self.placeholder(f"{past.name}_{name}", getattr(self.logical(past, layout), name))

    def logical(self, past: Node, layout: Layout) -> LogicalKV:
        """What stands for a cache tensor when the graph is compiled, made of a plain one where it must be."""
        fake = past.meta["example_value"]
        if isinstance(fake, LogicalKV):
            return fake
        if past not in self._adopted:
            self._adopted[past] = compress(layout, self.examples[self.argument(past)])
        return self._adopted[past]

    def extra_output(self, node: Node) -> int:
        """The place of ``node`` among the results, behind the graph's own."""
        if node not in self._extra:
            self._extra.append(node)
        return len(self.results) + self._extra.index(node)

    def token_count(self, length: Any) -> TokenCount | None:
        """Where a call's number of new tokens, ``length`` in the graph, stands in the arguments; None when nowhere."""
        if isinstance(length, int):
            return TokenCount(length)
        for index, node in enumerate(self.placeholders):
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and value.node.expr == length.node.expr:
                return TokenCount(None, index)
            if isinstance(value, Tensor) and not isinstance(value, LogicalKV):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == length.node.expr:
                        return TokenCount(None, index, dim)
        return None

    def finish(self) -> Bindings:
        """Give the graph its new output, drop what nobody reads, and return the whole signature."""
        kept = [i for i in range(len(self.results)) if i not in self._removed]
        self.graph.output_node().args = (tuple([self.results[i] for i in kept] + self._extra),)
        remove_dead_code(self.graph)
        alive = []
        for index, node in enumerate(self.placeholders):
            # Lengths are data now: without readers they would only add guards and arguments.
            if node.users or not _cache_or_length(node):
                alive.append(index)
            else:
                self.graph.erase_node(node)
        return Bindings(
            tuple(alive),
            tuple(self.appends),
            tuple(self.stores),
            tuple(kept + [len(self.results) + i for i in range(len(self._extra))]),
            len(self.results),
            tuple(self.shares),
        )


def _cache_or_length(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, (LogicalKV, torch.SymInt, int)) or "past_key_values" in node.name
