"""The tables of runners by kind of variant, and the baselines a user names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .baselines.eager import Eager
from .baselines.flex import Flex
from .baselines.hf_quantized import BACKENDS, HFQuantized
from .baselines.inductor import Inductor
from .baselines.kvpress import PRESSES, KVPress
from .baselines.static import Static
from .compiled import Compiled
from .operators.flex import FlexOperator
from .operators.kernel import Kernel
from .operators.sdpa import Sdpa
from .runner import Runner
from .variants import Variant

BASELINES: dict[str, type[Runner]] = {
    "eager": Eager,
    "inductor": Inductor,
    "static": Static,
    "flex": Flex,
    "hf_quantized": HFQuantized,
    "kvpress": KVPress,
}
OPERATORS: dict[str, type[Runner]] = {"sdpa": Sdpa, "flex": FlexOperator}


def runner_of(variant: Variant, case: str) -> Runner:
    """How ``variant`` runs in benchmarks of the kind ``case``."""
    if case == "attention":
        return {**OPERATORS, "torchaccel": Kernel}[variant.kind](variant.options)
    return {**BASELINES, "torchaccel": Compiled}[variant.kind](variant.options)


def parse_baselines(names: str, case: str = "generate") -> list[Variant]:
    """Baselines of ``case`` from a comma-separated list such as "eager,hf_quantized:fp8,kvpress:snapkv:0.5".

    Raises ``ValueError`` for what is not known, naming what is nearest to it.
    """
    known = OPERATORS if case == "attention" else BASELINES
    found = [name.strip() for name in names.split(",") if name.strip()]
    return [_baseline(name, known) for name in dict.fromkeys(found)]


def _baseline(label: str, known: Mapping[str, type[Runner]]) -> Variant:
    name, *arguments = label.split(":")
    if name not in known:
        raise _unknown("baseline", name, known)
    options = OPTIONS.get(name, _no_options)(label, arguments)
    return Variant(label, name, options)


def _no_options(label: str, arguments: list[str]) -> dict[str, Any]:
    if arguments:
        raise ValueError(f"baseline {label!r}: {label.split(':')[0]} takes no argument")
    return {}


def _hf_quantized(label: str, arguments: list[str]) -> dict[str, Any]:
    backend, *rest = arguments or ["quanto"]
    if rest:
        raise ValueError(f"baseline {label!r} must be hf_quantized[:backend]")
    if backend not in BACKENDS:
        raise _unknown("backend of hf_quantized", backend, BACKENDS)
    return {"backend": backend}


def _kvpress(label: str, arguments: list[str]) -> dict[str, Any]:
    if len(arguments) not in (1, 2):
        raise ValueError(f"baseline {label!r} must be kvpress:<press>[:ratio], such as kvpress:snapkv")
    press, *ratio = arguments
    if press not in PRESSES:
        raise _unknown("press of kvpress", press, PRESSES)
    if not ratio:
        return {"press": press}
    try:
        share = float(ratio[0])
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"baseline {label!r}: the ratio is the share of the prompt to evict, from 0 to below 1")
    return {"press": press, "compression_ratio": share}


OPTIONS: dict[str, Callable[[str, list[str]], dict[str, Any]]] = {"hf_quantized": _hf_quantized, "kvpress": _kvpress}


def _unknown(what: str, found: str, known: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(found, list(known), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {what} {found!r}{hint} Known: {', '.join(known)}")
