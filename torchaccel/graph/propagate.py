"""Example values of new or changed nodes, by running them on fake tensors; guards are never added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg


def fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The fake tensor mode the graph was captured in, or None for a graph without example values."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def infer(nodes: Iterable[Node], overrides: dict[Node, Any] | None = None) -> dict[Node, Any]:
    """Values of call nodes, in graph order, from the example values of their inputs; the graph is left as it is.

    overrides: values to use instead of ``meta["example_value"]``, for instance of inputs that are about to change.
    """
    values: dict[Node, Any] = dict(overrides or {})

    def value_of(node: Node) -> Any:
        return values[node] if node in values else node.meta["example_value"]

    for node in nodes:
        with _without_guards(node.graph):
            values[node] = run_node(node, map_arg(node.args, value_of), map_arg(node.kwargs, value_of))
    return values


def annotate(node: Node) -> Node:
    """Sets a new node's example value from those of its inputs, and returns it."""
    node.meta["example_value"] = infer([node])[node]
    return node


def run_node(node: Node, args: Any, kwargs: Any) -> Any:
    """Result of a ``call_function`` or ``call_method`` node on the given arguments."""
    if node.op == "call_method":
        target, *rest = args
        return getattr(target, str(node.target))(*rest, **kwargs)
    if node.op == "call_function" and callable(node.target):
        return node.target(*args, **kwargs)
    raise TypeError(f"{node.name} is a {node.op}: only calls of functions and methods can be run")


@contextlib.contextmanager
def _without_guards(graph: Graph) -> Iterator[None]:
    mode = fake_mode(graph)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield
