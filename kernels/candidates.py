"""The ways in which a spec can be realised on a device: what the cost model ranks and the tuner times."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, Literal

from . import composed, fused_reference, reference, selection_reference, sparse_reference
from .fused_spec import FusedSpec
from .selection_spec import SelectionSpec
from .sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from .spec import AttentionSpec, LinearSpec

Spec = AttentionSpec | LinearSpec | FusedSpec | SelectionSpec | SparseMlpSpec | ThresholdLinearSpec


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


@dataclass(frozen=True)
class Kernel:
    """A kind of kernel: what its specs are, the modules that generate it, and its reference.

    Each module has ``supports(spec)``, a function of the kernel's name that makes the callable of a spec and a config,
    and, where there is something to choose, ``configs(spec)``, the seed's first.
    """

    spec: type[Spec]
    modules: dict[str, str]
    reference: Callable[[Any], Callable[..., Any]]


# By name, which is that of the kernel in keys of the tuning cache, too.
KERNELS = {
    "decode_attention": Kernel(
        AttentionSpec,
        {"cpp": ".cpp.attention", "triton": ".triton.decode_attention"},
        lambda spec: partial(reference.decode_attention, spec),
    ),
    "prefill_attention": Kernel(
        AttentionSpec,
        {"cpp": ".cpp.window_prefill", "triton": ".triton.window_prefill"},
        lambda spec: partial(reference.prefill_attention, spec),
    ),
    "linear": Kernel(LinearSpec, {"cpp": ".cpp.linear", "triton": ".triton.linear"}, lambda spec: reference.linear),
    "fused": Kernel(
        FusedSpec, {"cpp": ".cpp.fused", "triton": ".triton.fused"}, lambda spec: partial(fused_reference.fused, spec)
    ),
    "select": Kernel(
        SelectionSpec,
        {"cpp": ".cpp.selection", "triton": ".triton.selection"},
        lambda spec: partial(selection_reference.select, spec),
    ),
    "sparse_mlp": Kernel(
        SparseMlpSpec,
        {"cpp": ".cpp.sparse_mlp", "triton": ".triton.sparse_mlp"},
        lambda spec: partial(sparse_reference.sparse_mlp, spec),
    ),
    "threshold_linear": Kernel(
        ThresholdLinearSpec,
        {"cpp": ".cpp.threshold_linear", "triton": ".triton.threshold_linear"},
        lambda spec: sparse_reference.threshold_linear,
    ),
}


def kernel_name(spec: Spec) -> str:
    """The kernel that ``spec`` describes, a key of ``KERNELS``."""
    if isinstance(spec, AttentionSpec):
        return f"{spec.phase}_attention"
    return next(name for name, kernel in KERNELS.items() if isinstance(spec, kernel.spec))


def spec_from_key(kernel: str, key: str) -> Spec:
    """The spec of a kernel whose ``key()`` is ``key``; ``ValueError`` for an unknown kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(KERNELS)}")
    return KERNELS[kernel].spec.from_key(key)


def candidates(spec: Spec, device: str) -> tuple[Candidate, ...]:
    """Every candidate for ``spec`` on the device type "cpu" or "cuda", the seed first and the reference last."""
    generated = {"cpu": "cpp", "cuda": "triton"}.get(device)
    found: list[Candidate] = []
    if generated is not None:
        module = _module(generated, spec)
        if module.supports(spec) is None:
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
    if generated is None:
        return f"no generated kernels for device {device}"
    reason: str | None = _module(generated, spec).supports(spec)
    return reason


@lru_cache(maxsize=4096)
def build(spec: Spec, candidate: Candidate) -> Callable[..., Any]:
    """The callable of a candidate, with the arguments of the reference after its spec.

    Raises ``ValueError`` for a spec that the implementation does not support, or a config it does not know; compilers
    raise what they raise.
    """
    name = kernel_name(spec)
    if candidate.implementation in ("composed", "reference"):
        if candidate.config:
            raise ValueError(f"'{candidate.implementation}' has no free choices; found {candidate.key()}")
        if candidate.implementation == "composed" and isinstance(spec, AttentionSpec):
            return partial(getattr(composed, name), spec)
        return KERNELS[name].reference(spec)
    make = getattr(_module(candidate.implementation, spec), name)
    run: Callable[..., Any] = make(spec, **dict(candidate.config))
    return run


def _module(implementation: str, spec: Spec) -> Any:
    # Imported on first use: a machine without a GPU never loads Triton, one without g++ never looks for it.
    return import_module(KERNELS[kernel_name(spec)].modules[implementation], __package__)
