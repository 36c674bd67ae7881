"""Steps that a graph spells out in several operators: norms, rotary embedding, GELU by tanh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, Node
from torchaccel.kernels.fused_spec import Activation, Norm, Rope, Step

from torchaccel.graph.nodes import arguments, is_number, op_name, shape
from torchaccel.graph.norms import find_norms
from torchaccel.graph.rotary import rotation_at

from .aliases import source

# The fields of an Atom: output, kind, values, nodes, facts.
Matched = tuple[Node, type[Step], dict[str, Any], frozenset[Node], dict[str, Any]]


def match_norms(graph: Graph) -> Iterator[Matched]:
    """Every norm over the last dimension."""
    for site in find_norms(graph):
        parameters = [node for node in (site.weight, site.bias) if node is not None]
        output = source(site.output)  # its last cast changes nothing in a float32 model
        nodes = _between(output, {site.input, *parameters})
        size = (shape(site.input) or (0,))[-1]
        if not nodes or any(shape(node) != (size,) for node in parameters):
            continue
        values = {"x": source(site.input), "weight": site.weight, "bias": site.bias}
        facts = {"kind": site.kind, "group": size, "eps": float(site.eps), "offset": site.weight_offset}
        yield output, Norm, values, nodes, facts


def match_rope(graph: Graph) -> Iterator[Matched]:
    """Every ``x * cos + rotate_half(x) * sin`` whose tables have one row, or one for each entry of the batch."""
    for node in graph.nodes:
        found = rotation_at(node)
        if found is not None and found.style == "half" and all(_is_table(t, found.x) for t in (found.cos, found.sin)):
            values = {"x": source(found.x), "cos": source(found.cos), "sin": source(found.sin)}
            yield node, Rope, values, found.nodes, {}


def match_gelu(graph: Graph) -> Iterator[Matched]:
    """Every ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``."""
    for node in graph.nodes:
        if op_name(node) != "tanh":
            continue
        scaled = arguments(node)[0]
        inner = _times(scaled, math.sqrt(2 / math.pi))
        if op_name(inner) != "add" or not all(isinstance(side, Node) for side in arguments(inner)):
            continue
        x, cubic = arguments(inner)
        cube = _times(cubic, 0.044715)
        if op_name(cube) != "pow" or arguments(cube)[0] is not x or float(arguments(cube)[1]) != 3.0:
            continue
        shifted = _only_user(node)
        product = None if shifted is None else _only_user(shifted)
        if shifted is None or product is None or op_name(product) != "mul":
            continue
        half = next((side for side in arguments(product) if side is not shifted), None)
        if op_name(shifted) == "add" and 1.0 in arguments(shifted) and _times(half, 0.5) is x and isinstance(x, Node):
            nodes = frozenset({node, scaled, inner, cubic, cube, shifted, product, half})
            yield product, Activation, {"x": source(x)}, nodes, {"function": "gelu_tanh"}


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _times(node: Any, factor: float) -> Any:
    """x of ``x * factor``."""
    if op_name(node) != "mul" or len(arguments(node)) != 2:
        return None
    numbers = [side for side in arguments(node) if is_number(side)]
    others = [side for side in arguments(node) if isinstance(side, Node)]
    if len(numbers) != 1 or len(others) != 1 or abs(numbers[0] - factor) > 1e-6 * factor:
        return None
    return others[0]


def _is_table(table: Node, x: Node) -> bool:
    """Whether a table broadcasts over x as one row for all, or one for each entry of x's first dimension."""
    of, rows = shape(table) or (), shape(x) or ()
    if len(of) not in (1, len(rows)) or not of or of[-1] != rows[-1]:
        return False
    return all(size == 1 for size in of[1:-1]) and (len(of) == 1 or of[0] in (1, rows[0]))


def _between(output: Node, stops: set[Node]) -> frozenset[Node] | None:
    """What a node is computed with back to some stops; None when it reads anything else."""
    pending, found = [output], set()
    while pending:
        node = pending.pop()
        if node in stops or node in found:
            continue
        if node.op not in ("call_function", "call_method"):
            return None
        found.add(node)
        # The second argument of type_as names a dtype only.
        pending.extend(node.all_input_nodes[:1] if op_name(node) == "type_as" else node.all_input_nodes)
    return frozenset(found)
