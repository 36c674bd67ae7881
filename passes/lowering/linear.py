"""Lowers linear layers of a few rows on the CPU to kernels that read the weights at memory bandwidth."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torchaccel.kernels import ops, registry
from torchaccel.kernels.spec import DTYPES, LinearSpec, dtype_name

# More rows than this and a GEMM reuses each weight often enough: stock kernels win.
MAX_ROWS = 4


def lower_linear(graph: Graph, device: torch.device) -> int:
    """Replace eligible ``linear`` nodes in place, those of one input together; returns how many were replaced."""
    if device.type != "cpu":
        return 0
    ops.library()
    groups: dict[tuple[Node, str], list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        if _eligible(node):
            groups[node.args[0], dtype_name(node.meta["example_value"].dtype)].append(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    done = 0
    for (x, dtype), nodes in groups.items():
        weights, biases = [n.args[1] for n in nodes], [_bias(n) for n in nodes]
        spec = LinearSpec(dtype, _rows(nodes[0]), any(b is not None for b in biases))
        if registry.linear(spec, device.type).reason is not None:
            continue
        # Weights and biases are graph inputs, so the first of the group is late enough for all of them.
        with graph.inserting_before(min(nodes, key=order.__getitem__)):
            call = graph.call_function(torch.ops.torchaccel.linear_rows.default, (x, weights, biases, spec.key()))
            results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(nodes))]
        for node, result in zip(nodes, results, strict=True):
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        done += len(nodes)
    return done


def _bias(node: Node) -> Node | None:
    found = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return found if isinstance(found, Node) else None


def _rows(node: Node) -> int:
    rows = 1
    for size in node.meta["example_value"].shape[:-1]:
        rows *= size
    return rows


def _eligible(node: Node) -> bool:
    value = node.meta.get("example_value")
    weight, bias = node.args[1], _bias(node)
    if value is None or value.dtype not in DTYPES.values() or not stored_weight(weight, 2):
        return False
    if any(not isinstance(size, int) for size in value.shape[:-1]) or not (bias is None or stored_weight(bias, 1)):
        return False
    return 0 < _rows(node) <= MAX_ROWS and bool(weight.meta["example_value"].dtype == value.dtype)


def stored_weight(node: object, rank: int) -> TypeGuard[Node]:
    """Whether a node is a contiguous parameter or buffer of ``rank`` dimensions, there before the graph runs."""
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return False
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() == rank and value.is_contiguous()
