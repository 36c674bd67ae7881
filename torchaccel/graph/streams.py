"""Walks along the residual stream: back through pointwise work, up to the projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from .nodes import CASTS, op_name, rank

PROJECTIONS = frozenset({"linear", "addmm", "matmul", "bmm", "baddbmm", "conv1d", "conv2d", "conv3d", "einsum"})
RESHAPES = frozenset({"view", "reshape", "contiguous", "clone", "flatten", "unflatten"})
_POINTWISE = frozenset(
    {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "dropout", "dropout_", "pow", "mean", "rsqrt", "sqrt"}
    | {"layer_norm", "rms_norm", "tanh", "neg"}
)
STREAM = RESHAPES | CASTS | _POINTWISE


def stream_back(start: Iterable[Node], stop: Callable[[Node], bool] | None = None) -> list[Node]:
    """Tensor nodes reached backwards through adds, norms, casts and reshapes, ``start`` and the last ones included.

    The branches of a residual block begin with a projection, which ends the walk: what is left is the residual stream.
    stop: the walk does not go past nodes for which this is true.
    """
    pending = list(start)
    seen = dict.fromkeys(pending)
    while pending:
        node = pending.pop()
        if op_name(node) not in STREAM or (stop is not None and stop(node)):
            continue
        for source in node.all_input_nodes:
            if source not in seen and rank(source) is not None:
                seen[source] = None
                pending.append(source)
    return list(seen)


def projection_inputs(node: Node) -> set[Node]:
    """Inputs of the projections nearest above a q, k or v node, through positions, norms, splits and transposes."""
    pending, seen = [node], {node}
    found: set[Node] = set()
    while pending:
        current = pending.pop()
        name = op_name(current)
        if name in PROJECTIONS:
            found.update(_data_inputs(current))
            continue
        if name == "embedding":
            continue
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return found


def shares_stream(sources: set[Node], others: set[Node]) -> bool:
    """Whether two sets of projection inputs were normed from one residual stream."""
    left = set(stream_back(sources))
    return any(node in left and (rank(node) or 0) > 2 for node in stream_back(others))  # weights have rank 2 at most


def _data_inputs(projection: Node) -> list[Node]:
    """What a projection projects: its operands without the weights, as far as they can be told apart."""
    name = op_name(projection)
    if name == "linear" or (name or "").startswith("conv"):
        return projection.all_input_nodes[:1]
    tensors = [source for source in projection.all_input_nodes if rank(source) is not None]
    return [source for source in tensors if source.op != "placeholder"] or tensors
