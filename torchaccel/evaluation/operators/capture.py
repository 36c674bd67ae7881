"""Which attention kernel the compiler chooses for a model and options, read off a graph that it rewrote."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from ...kernels.plan import Plan
from ...kernels.spec import AttentionSpec
from ...options import resolve
from ...passes.lowering.attention import AttentionLowering
from ...passes.manager import PassManager
from ..models import require_transformers, text_config

# Enough tokens for every choice that depends on the length of the prompt.
TOKENS = 512


@dataclass
class Captured:
    """The kernel of a model's first layer, None where stock operators run, and the reasons of what was declined."""

    spec: AttentionSpec | None = None
    declines: list[str] = field(default_factory=list)


@torch.no_grad()
def capture(model: Any, options: Mapping[str, Any], phase: str) -> Captured:
    """The attention of ``model`` in ``phase`` ("decode" or "prefill") as the compiler rewrites it under ``options``.

    A model of one layer is traced through the compiler's own passes. Masks are dropped from the spec: the operator is
    measured without padding.
    """
    transformers = require_transformers()
    config = copy.deepcopy(text_config(model))
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    single = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=model.device)
    found = Captured()
    cache = None
    if phase == "decode":
        cache, tokens = single(tokens, use_cache=True, logits_to_keep=1).past_key_values, tokens[:, :1]
    manager = PassManager(resolve(options).methods)

    def rewrite(gm: GraphModule, inputs: list[Any]) -> Any:
        module = GraphModule(gm, copy.deepcopy(gm.graph))
        context, passes = manager.run(module, model.device, "attention")
        lowered = AttentionLowering(context, inputs).run()
        found.declines += [str(decline) for result in passes for decline in result.declines]
        found.declines += [str(decline) for decline in lowered.declines]
        kernels = torch.ops.torchaccel.attend.default, torch.ops.torchaccel.attend_prompt.default
        for node in context.graph.nodes:
            if node.target in kernels:
                found.spec = _without_mask(Plan.from_key(str(node.args[-1])).spec)
        return gm.forward

    single.compile(backend=rewrite)
    single(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return found


def _without_mask(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, mask="none", causal=spec.causal or spec.phase == "prefill")
