"""Which kernels a rewritten graph calls, and at which sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from torchaccel.cost.shape import AttentionShape
from torchaccel.kernels import shared_prefix
from torchaccel.kernels.fused_spec import FusedSpec
from torchaccel.kernels.pick import Pick
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.selection_spec import SelectionSpec
from torchaccel.kernels.spec import AttentionSpec, LinearSpec

from .tuned import sizes
from .tuner import Task

# Operators whose candidate does not depend on a number of tokens that the graph does not know -> their kernel.
PICKED = {"torchaccel::linear_rows": "linear", "torchaccel::fused_rows": "fused", "torchaccel::select_blocks": "select"}
# Attention over a cache, and over the prompt or a static cache that the graph knows the size of.
APPENDING = ("torchaccel::attend", "torchaccel::attend_with", "torchaccel::attend_rotary")
FIXED = ("torchaccel::attend_static", "torchaccel::attend_prompt", "torchaccel::attend_prompt_with")
# Behind q, k_new, v_new, both buffers, lens and mask.
PREFIXES = 7


def tasks_in(
    graph: Graph, tokens: int | None, compared: Iterable[tuple[AttentionSpec, AttentionShape]] = ()
) -> list[Task]:
    """The distinct tasks of the ``torchaccel::`` operators in ``graph``, and of kernels it was ``compared`` with.

    tokens: stored tokens that attention is tuned for; None takes the prompt's, and leaves out what reads a cache, whose
    length is data. Operators of which another size is not fixed by the graph are left out, too.
    """
    found = [task for node in graph.nodes for task in _tasks(node, tokens)]
    if tokens is not None:
        found += [Task(spec, sizes(spec, shape.at(tokens))) for spec, shape in compared]
    return distinct(task for task in found if all(isinstance(size, int) for size in task.shape.values()))


def shared_tasks(tasks: Iterable[Task]) -> list[Task]:
    """The tasks of decode attention among ``tasks`` again, for rows whose caches all begin with the same tokens."""
    found: list[Task] = []
    for task in tasks:
        spec = task.spec
        if not isinstance(spec, AttentionSpec) or spec.phase != "decode" or task.shape["B"] == 1:
            continue
        if shared_prefix.unsupported(spec) is None:
            found += _both(spec, task.shape, 1)
    return distinct(found)


def distinct(tasks: Iterable[Task]) -> list[Task]:
    """The tasks, each once."""
    return list({(task.spec, tuple(sorted(task.shape.items()))): task for task in tasks}.values())


def picked_task(node: Node) -> Task | None:
    """The task of an operator that carries a ``Pick``, without a number of stored tokens; None for other nodes."""
    kernel = PICKED.get(operator_name(node))
    if kernel is None:
        return None
    spec = Pick.from_key(kernel, str(node.args[-1])).spec
    if isinstance(spec, LinearSpec):
        x, weights = node.args[:2]
        widths = [_shape(weight) for weight in weights]  # type: ignore[union-attr]
        rows = math.prod(_shape(x)[:-1])
        return Task(spec, {"M": rows, "K": widths[0][1], "N": sum(width[0] for width in widths)})
    if isinstance(spec, FusedSpec):
        return Task(spec, {"M": spec.rows})
    queries, summary = _shape(node.args[0]), _shape(node.args[1])
    return Task(spec, {"B": queries[0], "H_kv": summary[1], "Q": queries[2]})


def operator_name(node: Node) -> str:
    """The qualified name of the operator that a node calls; empty for other nodes."""
    return node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""


def _tasks(node: Node, tokens: int | None) -> list[Task]:
    operator, task = operator_name(node), picked_task(node)
    if task is not None:
        if not isinstance(task.spec, SelectionSpec):
            return [task]
        return [] if tokens is None else [Task(task.spec, {**task.shape, "S": tokens})]
    if operator == "torchaccel::attend_shared":
        return _shared(node, tokens)
    if operator not in APPENDING and operator not in FIXED:
        return []
    keys = _shape(node.args[1])
    stored = tokens if tokens is not None or operator in APPENDING else keys[2]
    return [] if stored is None else [_attention(node, str(node.args[-1]), keys[1], stored)]


def _attention(node: Node, plan: str, kv_heads: int, stored: int) -> Task:
    # The compiler chooses without regard to rotary embedding: all candidates do the same for it.
    spec, queries = replace(read_attention(plan), rotary="none", rotary_dim=0), _shape(node.args[0])
    shape = {"B": queries[0], "H_kv": kv_heads, "S": stored}
    return Task(spec, shape | {"Q": queries[2]} if spec.phase == "decode" else shape)


def _shared(node: Node, tokens: int | None) -> list[Task]:
    """Both kernels: over the prefix, for the stacked queries of its rows, and over the rows' own tokens."""
    if tokens is None:
        return []
    own = _attention(node, str(node.args[-2]), _shape(node.args[1])[1], tokens)
    assert isinstance(own.spec, AttentionSpec)
    return _both(own.spec, own.shape, _shape(node.args[PREFIXES][0])[0])  # type: ignore[index]


def _both(spec: AttentionSpec, shape: Mapping[str, int], entries: int) -> list[Task]:
    own, shared = shared_prefix.specs(spec)
    rows = {"B": entries, "Q": shape["Q"] * (shape["B"] // entries)}
    return [Task(shared, {**shape, **rows}), Task(own, shape)]


def read_attention(text: str) -> AttentionSpec:
    """The spec that an operator carries: by itself, or within a plan of which candidate runs it when."""
    return Plan.from_key(text).spec if "picks" in json.loads(text) else AttentionSpec.from_key(text)


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["example_value"].shape
    return shape
