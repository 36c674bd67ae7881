"""The model compiled by torchaccel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..options import resolve
from .results import Result
from .runner import Runner
from .variants import methods_of, requested


class Compiled(Runner):
    """``model.compile(backend="torchaccel")`` with the variant's options."""

    def compiles(self, case: str) -> bool:
        """Always."""
        return True

    def build(self, model: Any, case: str) -> Any:
        """Compile ``forward`` with torchaccel."""
        copy = super().build(model, case)
        copy.compile(backend="torchaccel", options=self.options or None)
        return copy

    def describe(self, model: Any, result: Result) -> None:
        """Graphs, recompiles, what took effect, and what was declined."""
        import torchaccel

        asked = requested(self.options)
        # Reports go by parameters, which all variants share: the options tell whose a record is.
        report = torchaccel.report(model)
        ours = resolve(self.options).requested()  # settings such as gate included
        report = replace(report, records=[r for r in report.records if r.requested == ours])
        result.graphs = report.graphs
        result.recompiles = report.recompiles
        result.effective = report.effective
        result.density = report.density
        missing = [m["method"] for _, m in methods_of(asked) if m["method"] not in report.effective]
        if missing or any(record.declined for record in report.records):
            result.status = "declined"
            why = "; ".join(report.declines) or f"no graph was compiled in which {', '.join(missing)} applies"
            result.reason = why

    @property
    def methods(self) -> dict[str, Any]:
        """The requested methods."""
        return requested(self.options)
