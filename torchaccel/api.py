"""The Python API: compile a model in place, tune and explain before, report after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchaccel.backend import Backend
from torchaccel.capture import capture_tasks, isolation
from torchaccel.entry_point import journal
from torchaccel.errors import TuningError
from torchaccel.options import resolve
from torchaccel.passes.calibrated import is_missing, load_plan
from torchaccel.reporting import Journal, Report
from torchaccel.tuning.cache import TuningCache, default_path
from torchaccel.tuning.tuner import Effort, Progress, Summary, Tuner

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(model: Model, **options: Any) -> Model:
    """Compile ``model`` in place with the torchaccel backend, so that ``model.generate()`` is reached; returns it.

    options: as in ``torch.compile(options=...)``, e.g. ``kv_compression="int8"``. Raises ``OptionsError`` for unknown
    names or impossible values, before anything is compiled.
    """
    resolved = resolve(options)
    for method in resolved.methods:
        plan = getattr(method.options, "plan", None)
        if plan is not None:
            plan.model.check_weights(model.parameters(), plan.described)
    model.compile(backend="torchaccel", options=_with_plans(options), **isolation())
    return model


def _with_plans(value: Any) -> Any:
    """Options with every plan as what it contains: Dynamo takes options of equal values for the same backend."""
    if isinstance(value, Mapping):
        # A file that is not there was found in the bundle.
        there = {key for key, item in value.items() if key == "plan" and not is_missing(item)}
        return {key: load_plan(item) if key in there else _with_plans(item) for key, item in value.items()}
    return [_with_plans(item) for item in value] if isinstance(value, (list, tuple)) else value


def report(model: torch.nn.Module) -> Report:
    """What was compiled for ``model`` so far: what fired where, what declined and why, bytes, time, recompiles."""
    return journal().of(model)


def tune(
    model: torch.nn.Module,
    inputs: Tensor | Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    effort: Effort = "quick",
    budget: float | None = 120.0,
    progress: Progress | None = None,
    *,
    shared_prompt: bool = False,
) -> Summary:
    """Measure the kernels that ``model`` needs for prompts of the size of ``inputs``, and for the tokens behind them.

    inputs: token ids ``[B, S]``, or keyword arguments. options: as for compiling; ``options["cache"]`` names the file
    of results. effort: "quick" (the likeliest candidates) or "full" (all). budget: seconds, None for no limit.
    shared_prompt: also what rows need that continue one prompt, stored once. What the cache has is not measured again.
    Raises ``TuningError`` when nothing in the model can be tuned.
    """
    tasks = capture_tasks(model, inputs, options, shared_prompt=shared_prompt)
    if not tasks:
        raise TuningError(
            "no kernel of torchaccel's was found in this model for these inputs and options; "
            "torchaccel.explain(model, ...) says what was declined and why"
        )
    cache = TuningCache(resolve(options).cache or default_path())
    device = next(model.parameters()).device
    return Tuner(cache, device, effort=effort, budget=budget).run(tasks, progress)


def explain(model: torch.nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **keywords: Any) -> Report:
    """What torchaccel would do for ``model(*inputs, **keywords)``, without compiling kernels around it or timing."""
    resolve(options)
    own = Journal()
    backend = Backend(own, execute_only=True)

    def rewrite(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return backend(gm, example_inputs, options=options)

    compiled = torch.compile(model.forward, backend=rewrite, **isolation())
    with torch.no_grad():
        compiled(*inputs, **keywords)
    return own.of(model)
