"""The Python API: compile a model in place, explain before, report after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from torchaccel.backend import Backend
from torchaccel.entry_point import journal
from torchaccel.options import resolve
from torchaccel.reporting import Journal, Report

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(model: Model, **options: Any) -> Model:
    """Compile ``model`` in place with the torchaccel backend, so that ``model.generate()`` is reached; returns it.

    options: as in ``torch.compile(options=...)``, e.g. ``kv_compression="int8"``. Raises ``OptionsError`` for unknown
    names or impossible values, before anything is compiled.
    """
    resolve(options)
    model.compile(backend="torchaccel", options=options)
    return model


def report(model: torch.nn.Module) -> Report:
    """What was compiled for ``model`` so far: what fired where, what declined and why, bytes, time, recompiles."""
    return journal().of(model)


def explain(model: torch.nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **keywords: Any) -> Report:
    """What torchaccel would do for ``model(*inputs, **keywords)``, without compiling kernels around it or timing."""
    resolve(options)
    own = Journal()
    backend = Backend(own, execute_only=True)

    def rewrite(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return backend(gm, example_inputs, options=options)

    compiled = torch.compile(model.forward, backend=rewrite)
    with torch.no_grad():
        compiled(*inputs, **keywords)
    return own.of(model)
