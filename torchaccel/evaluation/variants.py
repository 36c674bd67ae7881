"""The ways of running one model that are compared, as data: a label, a kind, options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..methods import FAMILIES
from ..options import resolve


@dataclass(frozen=True)
class Variant:
    """One way of running a model; ``kind`` names its runner, "torchaccel" or a baseline, ``options`` are for that."""

    label: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


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
        if any(_what_runs(given) == _what_runs(known.options) for known in variants):
            continue
        label = f"torchaccel:{method_label(given)}{'' if resolve(given).fusion else ' unfused'}"
        same = sum(known.label.split("#")[0] == label for known in variants)
        variants.append(Variant(f"{label}#{same + 1}" if same else label, "torchaccel", dict(given)))
    return variants


def requested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` in canonical form: family -> {"method": name, every parameter}, or a list of those.

    Raises ``torchaccel.errors.OptionsError`` for what torchaccel does not know.
    """
    asked = resolve(options).requested()
    return {family: asked[family] for family in FAMILIES if family in asked}


def method_label(options: Mapping[str, Any]) -> str:
    """The names of the methods in ``options`` joined by "+", or "exact"."""
    return "+".join(method["method"] for _, method in methods_of(requested(options))) or "exact"


def methods_of(asked: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(family, method with its parameters) for every method of canonical options."""
    return [(family, one) for family, found in asked.items() for one in (found if isinstance(found, list) else [found])]


def _what_runs(options: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    return requested(options), resolve(options).fusion
