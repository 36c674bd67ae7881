"""Runs passes in order over one graph: dumps, fuel, restoring after a failure."""

from __future__ import annotations

import copy
import os
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from torchaccel.errors import CalibrationError, DeclinedError, OptionsError
from torchaccel.graph.anatomy import analyze

from .base import Fidelity, Fuel, Method, Pass, PassResult, RewriteContext, SitePlan, Status
from .canonicalize.attention import canonicalize_attention
from .dead_code import remove_dead_code


class PassManager:
    """Applies the exact canonicalisation, then each method, to a graph."""

    def __init__(self, methods: Sequence[Method], *, strict: bool = False):
        self.methods = list(methods)
        self.strict = strict
        fuel = os.environ.get("TORCHACCEL_FUEL")
        if fuel and not fuel.isdecimal():
            raise OptionsError(f"TORCHACCEL_FUEL must be the number of rewrites to apply; found {fuel!r}")
        self.fuel = Fuel(int(fuel) if fuel else None)
        self.dump_folder = os.environ.get("TORCHACCEL_DUMP")

    def run(
        self, module: GraphModule, device: torch.device, label: str, parameters: Sequence[Tensor] = ()
    ) -> tuple[RewriteContext, list[PassResult]]:
        """Rewrite ``module.graph`` in place; returns the context for lowering and one result per pass.

        parameters: the model's, as far as the graph reads them.
        """
        results = []
        self.dump(module.graph, label, 0, "captured")
        results.append(self.canonicalize(module))
        self.dump(module.graph, label, 1, "canonicalize")
        context = RewriteContext(module.graph, module, device, self.fuel, analyze(module), parameters=tuple(parameters))
        for index, method in enumerate(self.methods, 2):
            results.append(self.apply(method, context))
            self.dump(module.graph, label, index, method.name)
        return context, results

    def canonicalize(self, module: GraphModule) -> PassResult:
        """Bring every spelling of attention to its one node; exact, so it is not a request and declines quietly."""
        # Dynamo leaves unread reads behind (a cache's numel()), which would look like further readers of the cache.
        remove_dead_code(module.graph)
        found = canonicalize_attention(module.graph)
        done = [rewrite.name for rewrite in found if rewrite.node is not None]
        left = [f"{r.name}: {r.reason} {r.detail}" for r in found if r.node is None]
        status = Status.APPLIED if done else Status.NO_MATCH
        return PassResult("canonicalize", Fidelity.EXACT, status, done, detail="; ".join(left))

    def apply(self, step: Pass, context: RewriteContext) -> PassResult:
        """Run one pass; when it fails the graph and the plan are what they were before it."""
        if context.anatomy.phase not in step.phases:
            return PassResult(step.name, step.fidelity, Status.NO_MATCH, detail=f"not for {context.anatomy.phase}")
        before, plans = copy.deepcopy(context.graph), _plan_values(context.plans)
        try:
            result = step.apply(context)
            context.graph.lint()
        except CalibrationError:
            raise
        except Exception as error:
            self._restore(context, before, plans)
            if self.strict:
                raise
            warnings.warn(
                f"torchaccel: {step.name} failed on the {context.anatomy.phase} graph and was not applied "
                f"({type(error).__name__}: {error}); the graph runs without it",
                stacklevel=2,
            )
            return PassResult(step.name, step.fidelity, Status.FAILED, detail=traceback.format_exc(limit=3))
        if result.declines:
            message = f"torchaccel: {step.name} left {len(result.declines)} site(s) as they were; {result.declines[0]}"
            if self.strict:
                raise DeclinedError(message)
            warnings.warn(message, stacklevel=2)
        return result

    def dump(self, graph: Graph, label: str, index: int, name: str) -> None:
        """Write the graph as readable Python when ``TORCHACCEL_DUMP`` names a folder."""
        if self.dump_folder:
            folder = Path(self.dump_folder)
            folder.mkdir(parents=True, exist_ok=True)
            code = graph.python_code("self", verbose=False).src
            (folder / f"{label}-{index:02d}-{name}.py").write_text(code, encoding="utf-8")

    def _restore(self, context: RewriteContext, before: Graph, plans: dict[int, SitePlan]) -> None:
        assert isinstance(context.module, GraphModule)
        context.module.graph = before
        context.graph = before
        context.refresh()
        # Nodes inside a plan belong to the discarded graph; the same names stand in the restored one.
        by_name = {node.name: node for node in before.nodes}
        for plan in plans.values():
            plan.keep = None if plan.keep is None else by_name[plan.keep.name]
        context.plans = plans


def _plan_values(plans: dict[int, SitePlan]) -> dict[int, SitePlan]:
    return {index: replace(p) for index, p in plans.items()}
