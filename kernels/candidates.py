"""The ways in which a spec can be realised on a device: what the cost model ranks and the tuner times."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, Literal

from . import composed, reference, sparse_reference
from .sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from .spec import AttentionSpec, LinearSpec

Spec = AttentionSpec | LinearSpec | SparseMlpSpec | ThresholdLinearSpec


@dataclass(frozen=True, order=True)
class Candidate:
    """An implementation ("cpp", "triton", "composed", "reference") and the free choices within it, by name."""

    implementation: Literal["cpp", "triton", "composed", "reference"]
    config: tuple[tuple[str, int | str], ...] = ()

    def key(self) -> str:
        """Canonical text, such as ``cpp`` or ``cpp{"split":"stream"}``."""
        return self.implementation + (
            json.dumps(dict(self.config), sort_keys=True, separators=(",", ":")) if self.config else ""
        )

    @staticmethod
    def from_key(key: str) -> Candidate:
        """The candidate whose ``key()`` is ``key``; ``ValueError`` when there is none."""
        name, brace, rest = key.partition("{")
        if name not in ("cpp", "triton", "composed", "reference"):
            raise ValueError(f"unknown implementation {name!r} in candidate {key!r}")
        config = json.loads(brace + rest) if brace else {}
        return Candidate(name, tuple(sorted(config.items())))  # type: ignore[arg-type]


def kernel_name(spec: Spec) -> str:
    """The kernel that ``spec`` describes, such as "decode_attention" or "linear"."""
    if isinstance(spec, AttentionSpec):
        return f"{spec.phase}_attention"
    return {LinearSpec: "linear", SparseMlpSpec: "sparse_mlp", ThresholdLinearSpec: "threshold_linear"}[type(spec)]


def candidates(spec: Spec, device: str) -> tuple[Candidate, ...]:
    """Every candidate for ``spec`` on the device type "cpu" or "cuda", the seed first and the reference last."""
    generated = {"cpu": "cpp", "cuda": "triton"}.get(device)
    found: list[Candidate] = []
    if generated is not None:
        module = _module(generated, spec)
        if module is not None and module.supports(spec) is None:
            configs = getattr(module, "configs", None)
            for config in configs(spec) if configs else ((),):
                found.append(Candidate(generated, tuple(sorted(config))))  # type: ignore[arg-type]
    # Beyond what sdpa can do it is the reference by another name, of which the cost model expects too much.
    if isinstance(spec, AttentionSpec) and not composed.beyond_sdpa(spec):
        found.append(Candidate("composed"))
    found.append(Candidate("reference"))
    return tuple(found)


def unsupported(spec: Spec, device: str) -> str | None:
    """Why no generated kernel runs ``spec`` on a device type, in one line for the user; None when one does."""
    generated = {"cpu": "cpp", "cuda": "triton"}.get(device)
    module = None if generated is None else _module(generated, spec)
    reason: str | None = module.supports(spec) if module else f"no generated kernels for device {device}"
    return reason


@lru_cache(maxsize=4096)
def build(spec: Spec, candidate: Candidate) -> Callable[..., Any]:
    """The callable of a candidate, with the arguments of the reference after its spec.

    Raises ``ValueError`` for a spec that the implementation does not support, or a config it does not know; compilers
    raise what they raise.
    """
    kernel = kernel_name(spec)
    if candidate.implementation in ("composed", "reference"):
        if candidate.config:
            raise ValueError(f"'{candidate.implementation}' has no free choices; found {candidate.key()}")
        if isinstance(spec, LinearSpec):
            return reference.linear
        if isinstance(spec, ThresholdLinearSpec):
            return sparse_reference.threshold_linear
        if isinstance(spec, SparseMlpSpec):
            return partial(sparse_reference.sparse_mlp, spec)
        module = composed if candidate.implementation == "composed" else reference
        return partial(getattr(module, kernel), spec)
    module = _module(candidate.implementation, spec)
    if module is None:
        raise ValueError(f"{candidate.implementation} has no kernel {kernel}")
    make = getattr(module, kernel)
    return make(spec, **dict(candidate.config))


_MODULES = {
    ("cpp", "decode_attention"): ".cpp.attention",
    ("cpp", "prefill_attention"): ".cpp.window_prefill",
    ("cpp", "linear"): ".cpp.linear",
    ("cpp", "sparse_mlp"): ".cpp.sparse_mlp",
    ("cpp", "threshold_linear"): ".cpp.threshold_linear",
    ("triton", "decode_attention"): ".triton.decode_attention",
    ("triton", "prefill_attention"): ".triton.window_prefill",
    ("triton", "linear"): ".triton.linear",
    ("triton", "sparse_mlp"): ".triton.sparse_mlp",
    ("triton", "threshold_linear"): ".triton.threshold_linear",
}


def _module(implementation: str, spec: Spec) -> Any:
    # Imported on first use: a machine without a GPU never loads Triton, one without g++ never looks for it.
    name = _MODULES.get((implementation, kernel_name(spec)))
    return None if name is None else import_module(name, __package__)
