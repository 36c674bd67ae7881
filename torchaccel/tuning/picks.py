"""Writes what was measured into the operators of a graph whose candidate depends on no length."""

from __future__ import annotations

from torch.fx import Graph

from torchaccel.kernels.candidates import candidates, kernel_name
from torchaccel.kernels.pick import Pick

from .tasks import picked_task
from .tuned import Tuned


def pick_kernels(graph: Graph, tuned: Tuned, device: str) -> list[str]:
    """Let every few-row linear layer, fused program and selection run the candidate that was measured to be fastest.

    device: type of the graph's device. Returns kernel and candidate of those that do not run their kernel's seed.
    Operators of which nothing is known keep it. Raises ``CacheMissError`` for these where hits are asserted.
    """
    found: list[str] = []
    for node in graph.nodes:
        task = picked_task(node)
        if task is None or not all(isinstance(size, int) for size in task.shape.values()):
            continue
        choices = candidates(task.spec, device)
        fastest = tuned.fastest(task.spec, task.shape, choices)
        if fastest != choices[0]:
            found.append(f"{kernel_name(task.spec)} {fastest.key()}")
            node.args = (*node.args[:-1], Pick(task.spec, fastest).key())
    return found
