"""Gated MLPs of a few rows by neurons in Triton: activated neurons, their part of down, and the total."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..sparse_spec import SparseMlpSpec
from ..spec import DTYPES
from .fused_values import FUNCTIONS
from .row_sums import COLUMNS, MAX_ROWS, ROWS_SUMMED, splits_of, total
from .source import TYPES, load, render_text
from .tiles import PRECISION, device_facts

SparseMlp = Callable[..., Tensor]

# Neurons of a program.
NEURONS = 16
WARPS, STAGES = 4, 3


def supports(spec: SparseMlpSpec) -> str | None:
    """Why no Triton kernel can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in TYPES:
        return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {spec.dtype}"
    if not 1 <= spec.rows <= MAX_ROWS:
        return f"the Triton kernel is for 1 to {MAX_ROWS} rows, where reading the weights dominates; found {spec.rows}"
    return None


def depth(spec: SparseMlpSpec) -> int:
    """Columns of x that one step multiplies: what the registers hold of near-exact float32 products."""
    return 64 if spec.dtype == "float32" else 128


@lru_cache(maxsize=64)
def generate(spec: SparseMlpSpec) -> str:
    """Triton source of ``spec``: ``activate``, ``collect`` and ``total``."""
    return render_text(
        "sparse_mlp.py.jinja",
        spec=f"dtype {spec.dtype}, {spec.activation}",
        dtype=TYPES[spec.dtype],
        rows=MAX_ROWS,
        activation=FUNCTIONS[spec.activation].format(x="gates"),
    )


@lru_cache(maxsize=256)
def sparse_mlp(spec: SparseMlpSpec) -> SparseMlp:
    """The kernels of ``spec``: ``sparse_reference.sparse_mlp`` without its first argument.

    ``call(x, gate, up, down, neurons=None) -> y``: x ``[..., hidden]`` of any strides, weights ``[F, hidden]`` whose
    rows may lie any distance apart. Raises ``ValueError`` for a spec that ``supports`` refuses, and at the call for
    other rows, shapes, dtypes or layouts than the spec says.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_sparse_mlp, spec)


def _sparse_mlp(
    spec: SparseMlpSpec, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor | None = None
) -> Tensor:
    dtype, device = DTYPES[spec.dtype], x.device
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    m, h = rows.shape
    if m > spec.rows or rows.dtype != dtype:
        raise ValueError(f"the kernel takes at most {spec.rows} rows in {spec.dtype}; found {m} in {rows.dtype}")
    for weight in (gate, up, down):
        if weight.dtype != dtype or weight.shape != (gate.shape[0], h) or weight.stride(1) != 1:
            raise ValueError(
                f"the kernel reads {spec.dtype} gate, up and transposed down [F, {h}] with contiguous rows; found "
                f"{weight.dtype} {list(weight.shape)} with strides {weight.stride()}"
            )
    if neurons is not None and (neurons.dtype != torch.int32 or neurons.dim() != 2 or neurons.shape[0] not in (1, m)):
        raise ValueError(f"lists of neurons are int32 [1 or {m}, K]; found {neurons.dtype} {list(neurons.shape)}")
    y = torch.empty_like(rows)
    length = gate.shape[0] if neurons is None else neurons.shape[1]
    listed = 0 if neurons is None else 1 if neurons.shape[0] == 1 else 2
    if not m or not length:
        return y.zero_().view(x.shape)
    neurons = None if neurons is None else neurons.contiguous()
    lists = m if listed == 2 else 1
    splits, each = splits_of(length, h, device, lists)
    activated = torch.empty(m, length, dtype=dtype, device=device)
    sums = torch.empty(splits, m, h, dtype=torch.float32, device=device)
    module = load(generate(spec), "sparse_mlp")
    common = {"M": m, "H": h, "LISTED": listed, "PRECISION": PRECISION[device_facts(device)[0]]}
    launch = {"num_warps": WARPS, "num_stages": STAGES}
    with torch.cuda.device_of(rows):
        module.activate[(-(-length // NEURONS), lists)](
            rows, gate, up, neurons, activated, gate.shape[0], length,
            gate_row=gate.stride(0), up_row=up.stride(0), BN=NEURONS, BK=depth(spec), **common, **launch,
        )  # fmt: skip
        module.collect[(-(-h // COLUMNS), splits, lists)](
            activated, down, neurons, sums, gate.shape[0], length, each,
            down_row=down.stride(0), BI=ROWS_SUMMED, BC=COLUMNS, **common, **launch,
        )  # fmt: skip
        total(module, sums, None, y)
    return y.view(x.shape)
