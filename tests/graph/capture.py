"""Records the graphs that Dynamo hands to a backend, with the inputs and outputs of their first call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule

PHASES = ["prefill", "decode", "extend", "static"]


@dataclass
class Captured:
    """One captured graph: a private copy of it, what it was first called with, and what it returned then."""

    module: GraphModule
    inputs: list[Any]
    outputs: list[Any]

    def run(self, module: GraphModule | None = None) -> list[Any]:
        """Outputs of ``module`` (the captured one when None) on copies of the recorded inputs."""
        with torch.no_grad():
            return list((module or self.module)(*_clone(self.inputs)))

    def copy(self) -> GraphModule:
        """A deep copy of the captured graph, free to rewrite."""
        return GraphModule(self.module, copy.deepcopy(self.module.graph))


def _clone(values: Any) -> Any:
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = False, **kwargs: Any) -> list[Captured]:
    """The graphs Dynamo makes of one call of ``function``."""
    found: list[Captured] = []

    def record(gm: GraphModule, _: list[Any]) -> Callable[..., Any]:
        private = GraphModule(gm, copy.deepcopy(gm.graph))
        seen = False

        def call(*inputs: Any) -> Any:
            nonlocal seen
            kept = _clone(inputs) if not seen else []
            outputs = gm(*inputs)
            if not seen:
                found.append(Captured(private, kept, _clone(outputs)))
                seen = True
            return outputs

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=record, dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return found


def tokens(batch: int, length: int, padded: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random token ids and their attention mask, both int64 ``[batch, length]``; ``padded`` pads row 0 on the left."""
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :3], mask[0, :3] = 0, 0
    return ids, mask


def inputs_of(mask: Tensor, count: int) -> dict[str, Tensor]:
    """Position ids of the last ``count`` columns of a mask, as generate() makes them, with the mask."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, -count:]}


def filled_cache(model: nn.Module, kind: str, ids: Tensor, mask: Tensor, capacity: int = 32) -> Any:
    """A DynamicCache ("dynamic") or StaticCache ("static") after an eager prefill of ``ids``, or an "empty" one."""
    if kind == "static":
        cache = hf.StaticCache(config=model.config, max_cache_len=capacity)
    else:
        cache = hf.DynamicCache(config=model.config)
    if kind != "empty":
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True, **inputs_of(mask, ids.shape[1]))
    return cache


def phase_call(
    model: nn.Module,
    phase: str,
    batch: int = 2,
    length: int = 7,
    padded: bool = True,
    dynamic: bool = False,
    extend: int = 3,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Token ids and keyword arguments of one call of a causal model in a phase; fresh caches at every call.

    phase: "prefill", "decode" (one token on a DynamicCache), "extend" (``extend`` tokens on it) or "static" (one token
    on a StaticCache). dynamic: mark the sequence dimensions dynamic (token count in prefill, cache length otherwise).
    """
    ids, mask = tokens(batch, length, padded)
    if phase == "prefill":
        cache = filled_cache(model, "empty", ids, mask)
        step = ids
    else:
        cache = filled_cache(model, "static" if phase == "static" else "dynamic", ids, mask)
        step, _ = tokens(batch, extend if phase == "extend" else 1, seed=1)
        mask = torch.cat([mask, torch.ones_like(step)], -1)
    arguments = {"use_cache": True, "logits_to_keep": 1, **inputs_of(mask, step.shape[1]), **kwargs}
    if dynamic:
        torch._dynamo.maybe_mark_dynamic(mask, 1)
        if phase == "prefill":
            torch._dynamo.maybe_mark_dynamic(step, 1)
            torch._dynamo.maybe_mark_dynamic(arguments["position_ids"], 1)
        elif phase != "static":
            for layer in cache.layers:
                torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
                torch._dynamo.maybe_mark_dynamic(layer.values, 2)
    return step, {"past_key_values": cache, **arguments}


def capture_phase(model: nn.Module, phase: str, dynamic: bool = False, **kwargs: Any) -> Captured:
    """The one graph of a phase of a causal model, asserted to be one; arguments as of ``phase_call``."""
    step, arguments = phase_call(model, phase, dynamic=dynamic, **kwargs)
    return _only(capture(model, step, dynamic=None if dynamic else False, **arguments))


def encoder_call(
    model: nn.Module, batch: int = 2, length: int = 7, padded: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """Token ids and mask, padded on the right, or pixels for a vision model."""
    if hasattr(model.config, "image_size"):
        size = model.config.image_size
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)), {}
    ids, mask = tokens(batch, length)
    if padded:
        mask[0, -3:] = 0
    return ids, {"attention_mask": mask}


def capture_encoder(model: nn.Module, **kwargs: Any) -> Captured:
    """The one graph of an encoder; arguments as of ``encoder_call``."""
    step, arguments = encoder_call(model, **kwargs)
    return _only(capture(model, step, **arguments))


def _only(found: list[Captured]) -> Captured:
    if len(found) != 1:
        raise AssertionError(f"expected one graph, Dynamo made {len(found)}")
    return found[0]
