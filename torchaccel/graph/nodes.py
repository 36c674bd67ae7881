"""Reading FX nodes: operator names, arguments, sizes without guards, reachability."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

Size = int | torch.SymInt

_NAMESPACES = (torch, F, operator, torch._C._nn, torch.Tensor)
_SYNONYMS = {
    "truediv": "div",
    "divide": "div",
    "multiply": "mul",
    "iadd": "add_",
    "imul": "mul_",
    "itruediv": "div_",
    "isub": "sub_",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}
CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})


def op_name(node: Any) -> str | None:
    """The operator a node calls, whatever its spelling (``a + b``, ``torch.add``, ``a.add(b)``), or None.

    Operators that write to their first argument end in an underscore, ``setitem`` excepted. Only functions of torch and
    of ``operator`` have a name: a foreign function that is merely called "linear" does not.
    """
    if not isinstance(node, Node):
        return None
    if node.op == "call_method":
        return _SYNONYMS.get(str(node.target), str(node.target))
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if any(getattr(space, name, None) is node.target for space in _NAMESPACES):
        return _SYNONYMS.get(name, name)
    return None


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """A call's argument given by position or by keyword."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def arguments(node: Node) -> tuple[Any, ...]:
    """A call's positional arguments, untyped."""
    return node.args


def shape(node: Any) -> tuple[Size, ...] | None:
    """Sizes of a tensor node's example value, or None."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def sizes(node: Any) -> tuple[Size, ...]:
    """Sizes of a node that is known to be a tensor."""
    found = shape(node)
    if found is None:
        raise TypeError(f"expected a tensor node, found {node} without an example value")
    return found


def rank(node: Any) -> int | None:
    """Number of dimensions of a tensor node, or None for anything else."""
    sizes = shape(node)
    return None if sizes is None else len(sizes)


def dtype(node: Any) -> torch.dtype | None:
    """Dtype of a tensor node, or None for anything else."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def expression(size: Any) -> Any:
    """A size as something comparable without guards: an int, or the SymPy expression of a SymInt."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known equal, as numbers or as expressions; adds no guard."""
    return bool(expression(a) == expression(b))


def same_shape(a: Any, b: Any) -> bool:
    """Whether two tensor nodes are known to have the same shape; adds no guard."""
    left, right = shape(a), shape(b)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(same_size(x, y) for x, y in zip(left, right, strict=True))


def hint(size: Size) -> int | None:
    """The size seen while capturing, or None where there is none; adds no guard."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.has_hint() else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether an argument is a plain Python number (not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def output_nodes(graph: Graph) -> list[Node]:
    """The nodes the graph returns, in order, each once."""
    return list(dict.fromkeys(graph.output_node().all_input_nodes))


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Every node the given ones are computed from, themselves included."""
    return _closure(nodes, lambda node: node.all_input_nodes)


def descendants(nodes: Iterable[Node]) -> set[Node]:
    """Every node computed from the given ones, themselves included."""
    return _closure(nodes, lambda node: node.users)


def _closure(nodes: Iterable[Node], step: Any) -> set[Node]:
    found = set(nodes)
    pending = list(found)
    while pending:
        for other in step(pending.pop()):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def tensor_arguments(node: Node) -> Iterator[Node]:
    """The inputs of a node that are tensors."""
    return (other for other in node.all_input_nodes if rank(other) is not None)


def positions(graph: Graph) -> dict[Node, int]:
    """Place of every node in the graph's order."""
    return {node: place for place, node in enumerate(graph.nodes)}


def writes_in_place(node: Node) -> bool:
    """Whether a node changes one of its arguments."""
    name = op_name(node)
    return name == "setitem" or (name is not None and name.endswith("_") and not name.endswith("__"))


def erase_dead(graph: Graph, roots: Iterable[Node]) -> None:
    """Erases the given nodes if nothing uses them, then whatever that leaves unused; never a placeholder or a write."""
    pending = list(roots)
    erased: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in erased or node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        if writes_in_place(node):
            continue
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)
        erased.add(node)
