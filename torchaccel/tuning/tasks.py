"""Which kernels a rewritten graph calls, and at which sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from torchaccel.kernels.candidates import Spec
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec, LinearSpec

from .tuner import Task


def tasks_in(graph: Graph, tokens: int | None) -> list[Task]:
    """The distinct tasks of the ``torchaccel::`` operators in ``graph``.

    tokens: stored tokens that attention is tuned for; None takes the prompt's, and leaves out attention over a cache,
    whose length is data. Operators of which another size is not fixed by the graph are left out, too.
    """
    found: dict[tuple[Spec, tuple[tuple[str, int], ...]], Task] = {}
    for node in graph.nodes:
        operator = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        task = _task(operator, node, tokens)
        if task is not None and all(isinstance(size, int) for size in task.shape.values()):
            found.setdefault((task.spec, tuple(sorted(task.shape.items()))), task)
    return list(found.values())


def _task(operator: str, node: Node, tokens: int | None) -> Task | None:
    if operator == "torchaccel::linear_rows":
        x, weights, biases, dtype = node.args[:4]
        widths = [_shape(weight) for weight in weights]  # type: ignore[union-attr]
        rows = math.prod(_shape(x)[:-1])
        spec = LinearSpec(str(dtype), rows, any(bias is not None for bias in biases))  # type: ignore[union-attr]
        return Task(spec, {"M": rows, "K": widths[0][1], "N": sum(width[0] for width in widths)})
    appends = operator in ("torchaccel::attend", "torchaccel::attend_rotary")
    if not appends and operator not in ("torchaccel::attend_static", "torchaccel::attend_prompt"):
        return None
    # The compiler chooses without regard to rotary embedding: all candidates do the same for it.
    attention = replace(read_attention(str(node.args[-1])), rotary="none", rotary_dim=0)
    queries, keys = _shape(node.args[0]), _shape(node.args[1])
    stored = tokens if tokens is not None or appends else keys[2]
    if stored is None:
        return None
    shape = {"B": queries[0], "H_kv": keys[1], "S": stored}
    if attention.phase == "decode":
        shape["Q"] = queries[2]
    return Task(attention, shape)


def read_attention(text: str) -> AttentionSpec:
    """The spec that an operator carries: by itself, or within a plan of which candidate runs it when."""
    return Plan.from_key(text).spec if "picks" in json.loads(text) else AttentionSpec.from_key(text)


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["example_value"].shape
    return shape
