"""The ways of running one model that are compared: eager, Inductor, Inductor with a static cache, torchaccel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..methods import FAMILIES
from ..options import resolve
from .models import share_weights

Kind = Literal["eager", "inductor", "static", "torchaccel"]
BASELINES: dict[str, Kind] = {"eager": "eager", "inductor": "inductor", "static": "static"}


@dataclass(frozen=True)
class Variant:
    """One way of running a model; ``options`` are torchaccel's, as the user gave them."""

    label: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_baselines(names: str) -> list[Variant]:
    """Baselines from a comma-separated list; raises ``ValueError`` for one that is not known."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in found if name not in BASELINES]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; the baselines are {', '.join(BASELINES)}")
    return [Variant(name, BASELINES[name]) for name in dict.fromkeys(found)]


def parse_options(text: str) -> dict[str, Any]:
    """torchaccel options from a JSON object; raises ``ValueError`` for anything else."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--options {text!r} is not JSON ({error}); give an object such as {EXAMPLE}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--options {text!r} is JSON but not an object; give one such as {EXAMPLE}")
    return options


EXAMPLE = '\'{"kv_compression": "int8"}\''


def torchaccel_variants(options: Iterable[Mapping[str, Any]]) -> list[Variant]:
    """One torchaccel variant for each set of options, labelled by its methods; repeated sets are dropped."""
    variants: list[Variant] = []
    for given in options:
        if any(requested(given) == requested(known.options) for known in variants):
            continue
        label = f"torchaccel:{method_label(given)}"
        same = sum(known.label.split("#")[0] == label for known in variants)
        variants.append(Variant(f"{label}#{same + 1}" if same else label, "torchaccel", dict(given)))
    return variants


def requested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` in canonical form: family -> {"method": name, every parameter}.

    Raises ``torchaccel.errors.OptionsError`` for what torchaccel does not know.
    """
    asked = resolve(options).requested()
    return {family: asked[family] for family in FAMILIES if family in asked}


def method_label(options: Mapping[str, Any]) -> str:
    """The names of the methods in ``options`` joined by "+", or "exact"."""
    return "+".join(method["method"] for method in requested(options).values()) or "exact"


def build(variant: Variant, model: nn.Module) -> nn.Module:
    """``model`` as ``variant`` runs it: modules of its own, the parameter tensors of ``model``."""
    copy = share_weights(model)
    if variant.kind in ("inductor", "static"):
        copy.compile(backend="inductor")
    elif variant.kind == "torchaccel":
        copy.compile(backend="torchaccel", options=dict(variant.options) or None)
    return copy
