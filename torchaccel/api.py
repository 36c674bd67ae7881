"""The Python API: compile a model in place, explain before, report after."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
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
    model.compile(backend="torchaccel", options=options, **_isolation())
    return model


def _isolation() -> dict[str, bool]:
    # Dynamo counts the graphs of all models of a class towards one limit of 8, and runs eagerly beyond it, unless
    # each compilation is isolated (torch 2.13; earlier versions do not know the argument).
    return {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


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
