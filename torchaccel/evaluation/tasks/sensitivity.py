"""Which layers cannot take a method: the loss with one layer treated at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...methods import FAMILIES
from ..arms import Arm
from ..variants import Variant, methods_of, requested
from .likelihood import reference_logits, score, summarise
from .run import Run


def one_layer_at_a_time(options: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """For every layer the options that apply the methods of ``options`` to it alone.

    Raises ``ValueError`` when a method of ``options`` cannot be kept to single layers.
    """
    asked = requested(options)
    layerwise = [m.name for methods in FAMILIES.values() for m in methods if "layers" in m.Options.model_fields]
    for family, method in methods_of(asked):
        if method["method"] not in layerwise:
            raise ValueError(
                f"{family} method {method['method']!r} treats no single layers, so it has no sensitivity by layer; "
                f"these methods do: {', '.join(layerwise)}"
            )
    found: list[dict[str, Any]] = []
    for layer in range(layers):
        alone: dict[str, list[dict[str, Any]]] = {}
        for family, method in methods_of(asked):
            alone.setdefault(family, []).append(method | {"layers": [layer]})
        found.append({family: methods[0] if len(methods) == 1 else methods for family, methods in alone.items()})
    return found


def measure_sensitivity(run: Run, arm: Arm) -> None:
    """The first batch of windows with one layer treated at a time; what cannot do that has a reason instead."""
    case, session = run.case, run.session
    assert arm.result.details is not None
    tokens, rows = next(run.batches())
    try:
        settings = one_layer_at_a_time(arm.variant.options, session.facts.layers)
    except ValueError as error:
        arm.result.details["sensitivity"] = {"metric": "kl", "layers": [], "reason": str(error)}
        return
    reference: list[Tensor] = []
    layers = []
    for layer, options in enumerate(settings):
        session.progress.advance(f"{arm.variant.label}: layer {layer} alone")

        def compute(options: dict[str, Any] = options) -> dict[str, Any]:
            if not reference:
                reference.append(reference_logits(run.truth, tokens, case.prompt))
            variant = Variant(f"{arm.variant.label}, one layer", "torchaccel", options)
            single = Arm(variant, session.loaded.model, session.device, arm.caches)
            return score(single.model, tokens, case.prompt, reference[0]).to_dict(rows)

        found, _ = summarise([run.remember(arm, "sensitivity", compute, layer=layer)], run.bytes_per_token, case.prompt)
        layers.append({"layer": layer, "kl": found.kl, "perplexity_ratio": found.perplexity_ratio})
    arm.result.details["sensitivity"] = {"metric": "kl", "layers": layers, "reason": None}
