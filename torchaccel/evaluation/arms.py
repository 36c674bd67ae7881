"""One variant under measurement: its model, the graphs compiled for it, its compile time and its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .results import Result
from .timing import timed
from .variants import Variant, build, requested


class Arm:
    """A variant being measured; ``result`` collects what is known of it and survives its failure."""

    def __init__(self, variant: Variant, model: nn.Module, device: torch.device, caches: str) -> None:
        """``caches``: "cold" or "warm", how compilation found its caches on disk."""
        self.variant = variant
        self.device = device
        self.caches = caches
        self.result = Result(variant.label, dict(variant.options))
        self.requested = requested(variant.options)
        self.model = build(variant, model)
        self.warm = False
        self._cold_ms: list[float] = []
        self._graphs = 0

    def run(self, call: Callable[[], object]) -> float:
        """Time one call in milliseconds; graphs that Dynamo compiles meanwhile are counted as this variant's."""
        before = _dynamo_graphs()
        spent = timed(call, self.device)
        self._graphs += _dynamo_graphs() - before
        if not self.warm:
            self._cold_ms.append(spent)
        return spent

    def describe(self, usual_ms: float, phases: int) -> None:
        """Fill in what was compiled: graphs, recompiles, seconds, and what torchaccel reports to have done.

        ``usual_ms`` is what a call takes once everything is compiled; ``phases`` is the number of graphs that a variant
        needs for this case (one for decode alone, two when a prompt comes first). Eager compiles nothing: null.
        """
        if self.variant.kind == "eager":
            return
        self.result.graphs = self._graphs
        self.result.recompiles = max(0, self._graphs - phases)
        # Compilation may come with the second call too: Inductor's length becomes dynamic, a plain cache is adopted.
        self.result.compile_s[self.caches] = round(sum(max(0.0, ms - usual_ms) for ms in self._cold_ms) / 1e3, 3)
        if self.variant.kind == "torchaccel":
            self._describe_torchaccel()

    @property
    def applied(self) -> dict[str, Any]:
        """The methods whose floor this variant is held to: the requested ones, none when one of them was declined."""
        return {} if self.result.status == "declined" else self.requested

    def _describe_torchaccel(self) -> None:
        import torchaccel

        # Reports go by parameters, which all variants share: the options tell whose a record is.
        report = torchaccel.report(self.model)
        report = replace(report, records=[r for r in report.records if r.requested == self.requested])
        self.result.graphs = report.graphs
        self.result.recompiles = report.recompiles
        self.result.effective = report.effective
        missing = [m["method"] for m in self.requested.values() if m["method"] not in report.effective]
        if missing or any(record.declined for record in report.records):
            self.result.status = "declined"
            why = "; ".join(report.declines) or f"no graph was compiled in which {', '.join(missing)} applies"
            self.result.reason = why


def _dynamo_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
