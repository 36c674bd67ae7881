"""One variant under measurement: its model, the graphs compiled for it, its compile time and its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..cost.probe import timed
from .generate import Sample
from .results import Result
from .runners import runner_of
from .variants import Variant


class Arm:
    """A variant being measured; ``result`` collects what is known of it and survives its failure."""

    def __init__(self, variant: Variant, model: Any, device: torch.device, caches: str, case: str = "generate") -> None:
        """``caches``: "cold" or "warm", how compilation found its caches on disk; ``case``: the kind of benchmark."""
        self.variant = variant
        self.device = device
        self.caches = caches
        self.runner = runner_of(variant, case)
        self.result = Result(variant.label, dict(variant.options))
        self.compiles = self.runner.compiles(case)
        self.model = self.runner.build(model, case)
        self.warm = False
        self._cold_ms: list[float] = []
        self._usual_ms = 0.0
        self._graphs = 0

    def run(self, call: Callable[[], object]) -> float:
        """Time one call in milliseconds; graphs that Dynamo compiles meanwhile are counted as this variant's."""
        before = _dynamo_graphs()
        spent = timed(call, self.device)
        self._note(spent, _dynamo_graphs() - before)
        return spent

    def generate(self, prompt: Tensor, new_tokens: int) -> Sample:
        """One timed ``generate()``; graphs are counted as ``run`` counts them."""
        before = _dynamo_graphs()
        found = self.runner.generate(self.model, prompt, new_tokens)
        self._note(found.ms, _dynamo_graphs() - before)
        return found

    def generate_peak(self, prompt: Tensor, new_tokens: int) -> int:
        """Bytes that ``generate()`` holds at most above the weights."""
        return self.runner.generate_peak(self.model, prompt, new_tokens, self.device)

    def describe(self, usual_ms: float, phases: int) -> None:
        """Fill in what was compiled: graphs, recompiles, seconds, and what the variant reports to have done.

        ``usual_ms`` is what a call takes once everything is compiled; ``phases`` is the number of graphs that a variant
        needs for this case (one for decode alone, two when a prompt comes first). What compiles nothing has null.
        """
        self._usual_ms = usual_ms
        if self.compiles:
            self.result.graphs = self._graphs
            self.result.recompiles = max(0, self._graphs - phases)
            self.result.compile_s[self.caches] = self._compile_seconds()
        self.runner.describe(self.model, self.result)

    def compile_again(self, call: Callable[[], object]) -> None:
        """Let ``call`` compile anew, its caches on disk being filled by now, and note the seconds as "warm"."""
        self.warm = False
        self._cold_ms.clear()
        call()
        self.warm = True
        self.result.compile_s["warm"] = self._compile_seconds()

    @property
    def applied(self) -> Mapping[str, Any] | None:
        """The methods whose floor this variant is held to, none when one was declined; None when it has no floor."""
        return {} if self.result.status == "declined" else self.runner.methods

    def _note(self, spent: float, graphs: int) -> None:
        self._graphs += graphs
        if not self.warm:
            self._cold_ms.append(spent)

    def _compile_seconds(self) -> float:
        # Compilation may come with the second call too: Inductor's length becomes dynamic, a plain cache is adopted.
        return round(sum(max(0.0, ms - self._usual_ms) for ms in self._cold_ms) / 1e3, 3)


def _dynamo_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
