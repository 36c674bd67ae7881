"""Generated C++ that scores the blocks of a cache by their summaries and chooses those that a decode step reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..selection_spec import SelectionSpec
from ..spec import DTYPES
from . import summary as summaries
from .compile import compile_source, render
from .formats import C_TYPES

Select = Callable[..., Tensor]

FIELDS = ("q, q_b, q_h, q_q, q_d", "summary, s_b, s_h, s_n, capacity", "lens, first, channels, out, scores, B, HKV, Q")

# Whether a thread takes whole KV heads, or parts of all of them: by their number, or as the tuner found best.
SHARES = {"": "heads >= at::get_num_threads() || small", "heads": "true", "tiles": "small"}


def supports(spec: SelectionSpec) -> str | None:
    """Why no C++ selection can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in C_TYPES:
        return f"the C++ kernel knows the dtypes {', '.join(C_TYPES)}; found {spec.dtype}"
    return summaries.supports(spec.summary)


def configs(spec: SelectionSpec) -> Iterator[tuple[tuple[str, str], ...]]:
    """The free choices, the seed first: what the threads share out."""
    yield ()
    yield (("share", "tiles"),)
    yield (("share", "heads"),)


def source(spec: SelectionSpec, share: str = "") -> str:
    """The C++ source of the selection of ``spec``; equal specs give equal text."""
    return render(
        "selection.cpp.jinja",
        title="torchaccel choice of blocks for a decode step",
        spec=spec.key(),
        fields=FIELDS,
        dtype=C_TYPES[spec.dtype],
        stored=C_TYPES[spec.summary.stored],
        dim=spec.summary.head_dim,
        columns=prod(spec.summary.row),
        group=spec.group,
        block=spec.summary.block,
        pool=spec.pool,
        minmax=_bool(spec.summary.kind == "minmax"),
        channels=_bool(spec.summary.kind == "channels"),
        mean=_bool(spec.reduce == "mean"),
        by_heads=SHARES[share],
        **choice(spec.width, spec.sinks, spec.recent, spec.scale, spec.mass, spec.probabilities),
    )


def choice(width: int, sinks: int, recent: int, scale: float, mass: float, probabilities: bool) -> dict[str, object]:
    """The symbols of selection_choice.cpp.jinja: how many entries, which always, and what they must hold."""
    return {
        "width": width,
        "sinks": sinks,
        "recent": recent,
        "scale": float(scale),
        "mass": float(mass),
        "probabilities": _bool(probabilities),
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"


@lru_cache(maxsize=1024)
def select(spec: SelectionSpec, share: str = "") -> Select:
    """The compiled selection of ``spec``: ``selection_reference.select`` without its first argument.

    ``call(q, summary, lens, first=None, channels=None) -> index``; q of any strides, rows of the summary packed.
    share: see ``configs``. Raises ``ValueError`` for a spec that ``supports`` refuses; the returned function raises
    ``RuntimeError`` when the summary has fewer rows than ``lens[1]`` slots need.
    """
    return _function(spec, False, share)


@lru_cache(maxsize=1024)
def scores(spec: SelectionSpec) -> Select:
    """The scores alone, from the same kernel: ``selection_reference.scores`` without its first argument."""
    return _function(spec, True)


def _function(spec: SelectionSpec, scored: bool, share: str = "") -> Select:
    reason = supports(spec)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(spec, share))
    dtype, stored = DTYPES[spec.dtype], DTYPES[spec.summary.stored]
    group, width, picks, packed = (
        spec.group,
        spec.width,
        spec.summary.kind == "channels",
        summaries.packed(spec.summary),
    )
    empty, int32, int64 = torch.empty, torch.int32, torch.int64

    def call(
        q: Tensor, summary: Tensor, lens: Tensor, first: Tensor | None = None, channels: Tensor | None = None
    ) -> Tensor:
        batch, heads, n, _ = q.shape
        if q.dtype != dtype:
            q = q.to(dtype)
        strides = summary.stride()
        if summary.dtype != stored or strides[3:] != packed:
            raise ValueError(
                f"the summary must be {stored} with rows of strides {packed}; found {summary.dtype}, {strides}"
            )
        if picks and (channels is None or channels.dtype != int32 or not channels.is_contiguous()):
            raise ValueError("kind 'channels' needs their numbers: a contiguous int32 tensor [B, H_kv, channels]")
        if first is not None and first.dtype != int64:
            first = first.to(int64)
        if scored:
            out = empty((batch, heads // group, -(-int(lens[1]) // spec.block)))
        else:
            out = empty((batch, heads // group, width), dtype=int32)
        address = out.data_ptr()
        kernel(
            q.data_ptr(), *q.stride(), summary.data_ptr(), *strides[:3], summary.shape[2],
            lens.data_ptr(), 0 if first is None else first.data_ptr(), 0 if channels is None else channels.data_ptr(),
            0 if scored else address, address if scored else 0, batch, heads // group, n,
        )  # fmt: skip
        return out

    return call
