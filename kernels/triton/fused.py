"""Fused programs over rows in Triton: one launch for each linear layer that waits for another, one for none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..fused_spec import FusedSpec, Linear
from ..spec import DTYPES
from .fused_program import MAX_ROWS, FusedConfig, Program
from .source import TYPES, load, render_text
from .tiles import PRECISION, device_facts

Fused = Callable[[Sequence[Tensor]], list[Tensor]]

# Where weights are read: wider or narrower tiles, longer steps, more or fewer warps, less that is loaded ahead.
LINEAR_CONFIGS: tuple[tuple[tuple[str, int], ...], ...] = (
    (),
    (("block_n", 32),),
    (("block_k", 256),),
    (("warps", 8),),
    (("block_k", 64),),
    (("warps", 2),),
    (("stages", 3),),
)


def supports(spec: FusedSpec) -> str | None:
    """Why no Triton kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in TYPES:
        return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {spec.dtype}"
    if any(isinstance(step, Linear) for step in spec.steps) and not 1 <= spec.rows <= MAX_ROWS:
        return f"the Triton kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return None


def program_of(spec: FusedSpec, **changes: int) -> Program:
    """The launches of ``spec``; changes: of its ``FusedConfig``, by name."""
    return Program(spec, replace(config(spec), **changes))


def config(spec: FusedSpec) -> FusedConfig:
    """Launch choices: without a linear layer, a program takes a whole row, so that its statistics are known at once."""
    if _has_linear(spec):
        return FusedConfig()
    widest = max(spec.widths()[out.value] for out in spec.outputs)
    return FusedConfig(columns=8192, warps=8 if widest > 2048 else 4, stages=1)


def configs(spec: FusedSpec) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The launch choices worth a try, the seed's first and one step from it in each direction behind it."""
    return LINEAR_CONFIGS if _has_linear(spec) else ((), (("warps", 12 - config(spec).warps),))


def _has_linear(spec: FusedSpec) -> bool:
    return any(isinstance(step, Linear) for step in spec.steps)


@lru_cache(maxsize=512)
def generate(spec: FusedSpec, **changes: int) -> str:
    """Triton source of ``spec``: ``phase_0``, ``phase_1`` ..., one for each launch; changes as in ``program_of``."""
    return render_text(
        "fused.py.jinja",
        rows=spec.rows,
        listing=spec.listing(),
        parameters=parameters(spec),
        phases=program_of(spec, **changes).phases,
    )


def parameters(spec: FusedSpec) -> list[str]:
    """Run-time parameters of every launch, in order."""
    return [*(f"in{i}" for i in range(len(spec.inputs))), "work", *(f"out{i}" for i in range(len(spec.outputs)))]


@lru_cache(maxsize=1024)
def fused(spec: FusedSpec, **changes: int) -> Fused:
    """The kernels of ``spec``: ``call(inputs) -> outputs``, as ``fused_reference.fused`` without the spec.

    changes: of the spec's ``FusedConfig``, by name. Raises ``ValueError`` for a spec that ``supports`` refuses, and at
    the call for an input with another dtype, number of elements or, but for rows and tables, layout than the spec says.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    dtype, program = DTYPES[spec.dtype], program_of(spec, **changes)
    grids = [sum(job.programs for job in jobs) for jobs in program.phases]
    expected = []
    for item in spec.inputs:
        wanted = torch.int64 if item.kind == "index" else dtype
        expected.append((torch.Size(item.shape).numel(), wanted, item.kind in ("rows", "table")))

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        given: list[Tensor] = []
        for place, (tensor, (count, wanted, movable)) in enumerate(zip(inputs, expected, strict=True)):
            if tensor.numel() != count or tensor.dtype is not wanted:
                raise ValueError(
                    f"input {place} of the kernel has {count} elements of {wanted}; "
                    f"found {list(tensor.shape)} of {tensor.dtype}"
                )
            if not movable and not tensor.is_contiguous():
                raise ValueError(f"input {place} must be contiguous; found strides {tensor.stride()}")
            given.append(tensor.contiguous())
        device = given[0].device
        outputs = [torch.empty(out.shape, dtype=dtype, device=device) for out in spec.outputs]
        work = torch.empty(program.work, dtype=torch.float32, device=device)
        module = load(generate(spec, **changes), "fused")
        precision = PRECISION[device_facts(device)[0]]
        with torch.cuda.device_of(given[0]):
            for phase, programs in enumerate(grids):
                kernel = getattr(module, f"phase_{phase}")
                kernel[(programs,)](
                    *given,
                    work,
                    *outputs,
                    PRECISION=precision,
                    num_warps=program.config.warps,
                    num_stages=program.stages,
                )
        return outputs

    return call
