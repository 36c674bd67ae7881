"""Which kernels a model needs, read off its rewritten graphs; nothing is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchaccel.backend import Backend
from torchaccel.options import resolve
from torchaccel.reporting import GraphRecord, Journal
from torchaccel.tuning.tasks import distinct, shared_tasks, tasks_in
from torchaccel.tuning.tuner import Task

# The model is traced with prompts of so many tokens at most: enough for every choice that depends on their length.
TOKENS = 512


def capture_tasks(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    options: Mapping[str, Any] | None,
    *,
    shared_prompt: bool = False,
) -> list[Task]:
    """The tasks of ``model`` for a prompt of the size of ``inputs``, and for the token after it where there is a cache.

    inputs: token ids ``[B, S]``, which a language model gets as from ``generate()``: with a mask, for the last token's
    logits; or the model's keyword arguments, each ``[B, S, ...]`` or independent of S. A shorter
    prompt runs through the model as it is; its rewritten graphs are looked at, for S tokens. shared_prompt: the rows
    may continue one prompt, stored once, too.
    """
    arguments = _as_generated(model, inputs) if isinstance(inputs, Tensor) else dict(inputs)
    sizes = [value.shape[:2] for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1]
    if not sizes:
        raise ValueError(f"inputs must hold a tensor [B, S, ...]; found {', '.join(arguments) or 'nothing'}")
    tokens = sizes[0][1]
    resolved = resolve(options)
    backend = Backend(Journal(), execute_only=True)
    found: list[Task] = []

    def look(gm: GraphModule, examples: list[Any]) -> Any:
        module, lowered = backend.rewrite(gm, list(examples), resolved, GraphRecord("unknown", {}, {}))
        found.extend(tasks_in(module.graph, tokens, lowered.compared))
        return gm.forward

    # Static: a second size would be traced as any size, for which nothing can be measured.
    compiled = torch.compile(model.forward, backend=look, dynamic=False, **isolation())
    short = {name: _cut(value, tokens) for name, value in arguments.items()}
    with torch.no_grad():
        output = compiled(**short)
        cache = getattr(output, "past_key_values", None)
        if cache is not None and "input_ids" in short:
            compiled(**_next(short), past_key_values=cache)
    return distinct([*found, *(shared_tasks(found) if shared_prompt else [])])


def _as_generated(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """The arguments with which ``generate()`` calls a language model; other models get the ids alone."""
    generates: Any = getattr(model, "can_generate", None)
    if generates is None or not generates():
        return {"input_ids": ids}
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **last}


def isolation() -> dict[str, Any]:
    """Arguments of ``torch.compile`` with which a compilation does not count for others of the same code.

    Dynamo counts the graphs of all models of a class towards one limit of 8, and runs eagerly beyond it, unless each
    compilation is isolated (torch 2.13; earlier versions do not know the argument).
    """
    return {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


def _cut(value: Any, tokens: int) -> Any:
    along = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens
    return value[:, :TOKENS] if along else value


def _next(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the step after ``prompt``: one token a row, and a mask that is one column longer."""
    step = {"input_ids": prompt["input_ids"][:, -1:]}
    mask = prompt.get("attention_mask")
    if mask is not None:
        step["attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
    return step
