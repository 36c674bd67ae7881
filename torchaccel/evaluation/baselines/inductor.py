"""The whole model compiled by Inductor."""

from __future__ import annotations

from typing import Any

from ..runner import Runner


class Inductor(Runner):
    """``model.compile()`` with the default backend and the model's own growing cache."""

    def compiles(self, case: str) -> bool:
        """Always."""
        return True

    def build(self, model: Any, case: str) -> Any:
        """Compile ``forward`` with Inductor."""
        copy = super().build(model, case)
        copy.compile(backend="inductor")
        return copy
