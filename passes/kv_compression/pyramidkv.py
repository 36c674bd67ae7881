"""PyramidKV: SnapKV with larger budgets for low layers, where attention is broad, than for high ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from torchaccel.runtime.eviction import Budget, Prompt

from .evicting import EvictingMethod
from .snapkv import SnapKVOptions, SnapKVPolicy


class PyramidKVOptions(SnapKVOptions):
    """beta: how steep budgets fall from the first layer to the last; the budget is the mean over the layers. Others as
    for snapkv."""

    default_budget: ClassVar[Budget] = Budget(tokens=2048)

    beta: int = Field(default=20, ge=1, le=1024)


@dataclass(frozen=True)
class PyramidKVPolicy(SnapKVPolicy):
    """Budgets, the window's tokens apart, fall linearly with the layer."""

    beta: int = 20

    def capacity(self, prompt: Prompt) -> int:
        mean, tokens = super().capacity(prompt), prompt.keys.shape[2]
        window = min(self.window, prompt.queries.shape[2])
        if mean <= window:
            return mean
        return window + pyramid(mean - window, tokens - window, prompt.layer, prompt.layers, self.beta)


def pyramid(base: int, room: int, layer: int, layers: int, beta: int) -> int:
    """Budget of ``layer`` when the mean is ``base`` and no layer has more than ``room`` tokens to choose from."""
    if base >= room or layers == 1:
        return base
    least = base // beta
    most = 2 * base - least
    if most >= room:
        most = room
        least = 2 * base - most
    return max(1, most - layer * ((most - least) // (layers - 1)))


class PyramidKV(EvictingMethod):
    """After the prompt each KV head keeps what its last queries attend to, in low layers more of it; then it grows."""

    name = "pyramidkv"
    paper = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (2024)"
    Options = PyramidKVOptions

    def policy(self) -> PyramidKVPolicy:
        return PyramidKVPolicy(**self.settings("window", "kernel", "pooling", "gqa_reduce", "beta"))
