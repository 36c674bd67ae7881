"""Which KV heads see sinks and a window only: those that neither a plan nor the user makes retrieval heads."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from torchaccel.calibration.head_gates import gates_of, retrieval_heads
from torchaccel.graph.anatomy import AttentionSite

from .base import Decline, Reason
from .calibrated import CalibratedOptions


class StreamingHeadsOptions(CalibratedOptions):
    """Which heads keep everything is a plan's to say, or ``retrieval_heads``': for each layer its KV heads, none for
    layers without an entry. sparsity: share of the heads that a plan makes streaming ones. sinks, recent: first and
    last tokens that these see. steps: of calibration, 2000 in the paper."""

    retrieval_heads: dict[int, tuple[int, ...]] | None = Field(default=None)
    sparsity: float = Field(default=0.5, ge=0.0, le=1.0)
    sinks: int = Field(default=64, ge=0, le=65536)
    recent: int = Field(default=256, ge=1, le=1 << 20)
    steps: int = Field(default=200, ge=1, le=100_000)

    decided: ClassVar[tuple[str, ...]] = ("sinks", "recent", "steps")

    @field_validator("retrieval_heads")
    @classmethod
    def _natural(cls, value: dict[int, tuple[int, ...]] | None) -> dict[int, tuple[int, ...]] | None:
        if value is None:
            return None
        if any(number < 0 for layer, heads in value.items() for number in (layer, *heads)):
            raise ValueError("layers and heads are counted from 0")
        return {layer: tuple(sorted(set(heads))) for layer, heads in sorted(value.items())}

    @model_validator(mode="after")
    def _one_source(self) -> StreamingHeadsOptions:
        unused = {"plan", "sparsity", "steps"} & self.model_fields_set
        if self.retrieval_heads is not None and unused:
            raise ValueError(f"retrieval_heads says which heads they are; leave out {' and '.join(sorted(unused))}")
        return self

    @property
    def open_to_plan(self) -> bool:
        return not self.named

    @property
    def named(self) -> bool:
        """Whether anything says which heads are streaming ones."""
        return self.plan is not None or self.retrieval_heads is not None

    def streaming(self, site: AttentionSite) -> tuple[bool, ...]:
        """For each KV head of a site whether it is a streaming one."""
        retrieving = self._retrieving(site)
        return tuple(head not in retrieving for head in range(site.kv_heads))

    def refuse(self, site: AttentionSite) -> Decline | None:
        """Why the named heads are not this site's, or None."""
        wrong = [head for head in self._retrieving(site) if head >= site.kv_heads]
        return Decline(site.name, Reason.NO_SUCH_HEAD, f"KV head {wrong[0]} of {site.kv_heads}") if wrong else None

    def _retrieving(self, site: AttentionSite) -> tuple[int, ...]:
        if self.plan is not None:
            return retrieval_heads(gates_of(self.plan.tensors), self.sparsity)[site.index]
        return (self.retrieval_heads or {}).get(site.index if site.layer is None else site.layer, ())
