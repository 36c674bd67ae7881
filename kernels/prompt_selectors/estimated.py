"""Blocks by an estimate of every block pair (XAttention, and MInference's block-sparse heads)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .. import registry
from ..selection_spec import PromptSelectionSpec
from ..spec import AttentionSpec
from .base import PromptSelector, banded_share


@dataclass(frozen=True)
class EstimatedBlocks(PromptSelector):
    """The best blocks of every block of queries by ``PromptSelectionSpec``, whose fields these are.

    width: entries of a list, 0 for as many as ``mass`` needs.
    """

    estimate: Literal["antidiagonal", "mean"] = "antidiagonal"
    stride: int = 16
    width: int = 0
    mass: float = 1.0
    sinks: int = 1
    recent: int = 1

    def spec(self, spec: AttentionSpec) -> PromptSelectionSpec:
        """The kernel's description for attention of ``spec``."""
        return PromptSelectionSpec(
            self.estimate,
            spec.head_dim,
            spec.group,
            spec.dtype,
            spec.scale,
            self.width,
            self.block,
            self.stride,
            self.sinks,
            self.recent,
            self.mass,
        )

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        lists: Tensor = registry.select_prompt(self.spec(spec), q.device.type).run(q, k, first)
        return lists

    def share(self, tokens: int) -> float:
        if self.width:
            return banded_share(tokens, self.width * self.block)
        return expected_share(tokens, self.mass, (1 + self.sinks + self.recent) * self.block)

    def effort(self, tokens: int) -> float:
        # Products are half of attention; those of means are few.
        return 0.5 / (self.stride if self.estimate == "antidiagonal" else self.block)


def expected_share(tokens: int, mass: float, least: int) -> float:
    """What blocks that hold ``mass`` of the attention are expected to be of a long prompt; all up to ``least`` tokens.

    How many they are is the prompt's business. The guess, a third at most, is on the side of dense attention.
    """
    return 1.0 if mass >= 1 or tokens <= least else 1 / 3
