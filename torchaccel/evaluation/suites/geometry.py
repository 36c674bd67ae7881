"""The sizes that a suite's scenarios share, and random content of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.candidates import Candidate, build, candidates
from ...kernels.spec import AttentionSpec, KVFormat

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Geometry:
    """One layer's heads, lengths and device; ``decode`` and ``prefill`` are numbers of tokens."""

    device: torch.device
    decode: int
    prefill: int
    prefix: int
    kv_heads: int = 4
    group: int = 3
    head_dim: int = 64

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    def normal(self, batch: int, heads: int, tokens: int) -> Tensor:
        """Normal values ``[B, heads, tokens, D]`` in bfloat16."""
        return torch.randn(batch, heads, tokens, self.head_dim, device=self.device).bfloat16()

    def format(self, kind: Any = "dense", role: str = "key", window: int = 0) -> KVFormat:
        """A KV format as KIVI has it: keys by channel, values by token, groups of 64."""
        if kind == "dense":
            return KVFormat(kind, DTYPE, self.head_dim)
        axis, packing = ("channel", "channel") if role == "key" else ("token", "token")
        return KVFormat(kind, DTYPE, self.head_dim, axis, window=window, packing=packing)  # type: ignore[arg-type]

    def spec(self, phase: Any, kind: str = "dense", **changes: Any) -> AttentionSpec:
        """The spec of one attention kernel of this geometry; ``changes`` as in ``AttentionSpec``."""
        window = 128 if kind in ("int4", "int2") else 0
        formats = self.format(kind, "key", window), self.format(kind, "value", window)
        scale = self.head_dim**-0.5
        group = changes.pop("group", self.group)
        return AttentionSpec(phase, self.head_dim, group, DTYPE, *formats, scale, **changes)

    def seed(self, spec: AttentionSpec) -> Any:
        """The kernel that runs ``spec`` where nothing was tuned."""
        return build(spec, self.candidate(spec))

    def candidate(self, spec: AttentionSpec) -> Candidate:
        """What ``seed`` builds."""
        return candidates(spec, self.device.type)[0]
