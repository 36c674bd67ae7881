"""Blocks by an estimate of every block pair (XAttention, and MInference's block-sparse heads)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .. import registry
from ..selection_spec import PromptSelectionSpec
from ..spec import AttentionSpec
from .base import EXPECTED, PromptSelector, banded_share, expected_share


@dataclass(frozen=True)
class EstimatedBlocks(PromptSelector):
    """The best blocks of every block of queries by ``PromptSelectionSpec``, whose fields these are.

    width: entries of a list, 0 for as many as ``mass`` needs. expected: the share of the causal pairs that these are
    thought to hold.
    """

    estimate: Literal["antidiagonal", "mean"] = "antidiagonal"
    stride: int = 16
    width: int = 0
    mass: float = 1.0
    sinks: int = 1
    recent: int = 1
    expected: float = EXPECTED

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
            spec.softcap,
        )

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        lists: Tensor = registry.select_prompt(self.spec(spec), q.device.type).run(q, k, first)
        return lists

    def share(self, tokens: int) -> float:
        if self.width:
            return banded_share(tokens, self.width * self.block)
        return expected_share(tokens, self.mass, (1 + self.sinks + self.recent) * self.block, self.expected)

    def effort(self, tokens: int) -> float:
        # Products are half of attention; those of means are few.
        return 0.5 / (self.stride if self.estimate == "antidiagonal" else self.block)
