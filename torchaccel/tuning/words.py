"""Specs in a few words, where a table or a progress line needs them."""

from __future__ import annotations

from itertools import groupby

from torchaccel.kernels.candidates import Spec, spec_from_key
from torchaccel.kernels.fused_spec import FusedSpec, Linear
from torchaccel.kernels.selection_spec import SelectionSpec
from torchaccel.kernels.sparse_spec import SparseMlpSpec
from torchaccel.kernels.spec import DTYPES, AttentionSpec


def described(kernel: str, key: str) -> str:
    """What tells a spec from others of its kernel; empty for a kernel that this version does not know."""
    try:
        return words(spec_from_key(kernel, key))
    except (ValueError, TypeError, KeyError):
        return ""


def words(spec: Spec) -> str:
    """What tells ``spec`` from others of its kernel, such as "bfloat16, int8, window 64+4"."""
    if isinstance(spec, AttentionSpec):
        return ", ".join([spec.dtype, *_attention(spec)])
    if isinstance(spec, FusedSpec):
        names = [type(step).__name__.lower() for step in spec.steps]
        counts = [(name, len(list(same))) for name, same in groupby(names)]
        steps = ", ".join(name if times == 1 else f"{times} {name}" for name, times in counts)
        return f"{spec.dtype}, {_weight_bytes(spec) / 1e6:.1f} MB: {steps}"
    if isinstance(spec, SelectionSpec):
        kept = spec.summary
        return f"{spec.dtype}, {spec.width} by {kept.kind} of {kept.block}"
    if isinstance(spec, SparseMlpSpec):
        return f"{spec.dtype}, {spec.activation}"
    return f"{spec.dtype}{', bias' if spec.bias else ''}"


def _attention(spec: AttentionSpec) -> list[str]:
    kinds = dict.fromkeys(fmt.kind for fmt in (spec.key_format, spec.value_format))
    found = ["/".join(kinds)]
    found += [f"mask {spec.mask}"] if spec.mask != "none" else []
    found += [f"window {spec.window}+{spec.sinks}"] if spec.window is not None else []
    found += [f"lists of {spec.index}"] if spec.index != "contiguous" else []
    return found + [name for name in ("positions", "head_windows", "lse", "mass") if getattr(spec, name)]


def _weight_bytes(spec: FusedSpec) -> int:
    shapes = [spec.inputs[step.weight].shape for step in spec.steps if isinstance(step, Linear)]
    return sum(n * k for n, k in shapes) * DTYPES[spec.dtype].itemsize
