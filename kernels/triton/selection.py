"""Block selection in Triton: scores by summaries and the choice among them, in one launch where a head has few rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..selection_spec import SelectionSpec
from ..spec import DTYPES
from . import summary as summaries
from .source import TYPES, load, render_text, scalars
from .tiles import device_facts, split_count
from .units import on_device, rows_in_units

Select = Callable[..., Tensor]

# Query heads of a KV head that one tile of scores can hold.
MAX_GROUP = 32
# Blocks up to which the choice takes steps of 1024: its 32 passes over the scores wait for little else than memory.
FEW_BLOCKS = 4096

_TENSORS = {"q", "summary", "first", "channels", "scores", "logits", "out"}


def supports(spec: SelectionSpec) -> str | None:
    """Why no Triton selection can be generated for ``spec``, in one line for the user; None when one can."""
    if spec.dtype not in TYPES:
        return f"the Triton kernel knows the dtypes {', '.join(TYPES)}; found {spec.dtype}"
    if spec.group > MAX_GROUP:
        return f"the Triton kernel handles up to {MAX_GROUP} query heads per KV head; found {spec.group}"
    return summaries.supports(spec.summary)


def score_parameters(spec: SelectionSpec) -> list[str]:
    """Run-time parameters of the generated ``score``, in order."""
    names = ["q", "summary", *(["channels"] if spec.summary.kind == "channels" else [])]
    names += ["first", "logits" if spec.probabilities else "scores", "start", "end", "Q"]
    return [*names, "q_b", "q_h", "q_t", "s_b", "s_h"]


def choose_parameters(spec: SelectionSpec) -> list[str]:
    """Run-time parameters of the generated ``choose``, in order."""
    softmax = ["logits", "Q"] if spec.probabilities else []
    return ["scores", "out", "first", "start", "end", *softmax]


def parameters(spec: SelectionSpec) -> list[str]:
    """Run-time parameters of the generated ``select``, in order."""
    return list(dict.fromkeys([*score_parameters(spec), *choose_parameters(spec)]))


def tile(spec: SelectionSpec) -> tuple[int, int]:
    """Blocks of one tile of scores, and the warps that work on it: what their registers hold."""
    if spec.summary.row[-1] > 128:
        return 16, 8
    return (32, 8) if "float32" in (spec.dtype, spec.summary.stored) else (64, 4)


def configs(spec: SelectionSpec) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The launch choices of the scores worth a try, the seed's first: other tiles, and other warps for its own."""
    size, warps = tile(spec)
    sizes = [other for other in (size // 2, size * 2) if 16 <= other <= 128]
    return (), *((("block_n", other),) for other in sizes), (("warps", 12 - warps),)


def step(blocks: int) -> tuple[int, int]:
    """Blocks that one step of the choice holds in registers, and its warps: two kernels, however a cache grows."""
    return (1024, 4) if blocks <= FEW_BLOCKS else (8192, 8)


@lru_cache(maxsize=512)
def generate(spec: SelectionSpec) -> str:
    """Triton source of ``spec``: ``score``, ``choose``, and ``select`` for both."""
    summary = spec.summary
    heads = 1 << (spec.group - 1).bit_length()
    same = spec.dtype == summary.stored and spec.dtype != "float32"
    return render_text(
        "selection.py.jinja",
        summary.row[-1],
        key=spec.key(),
        score_parameters=score_parameters(spec),
        choose_parameters=choose_parameters(spec),
        parameters=parameters(spec),
        scalars=partial(scalars, tensors=_TENSORS),
        G=spec.group,
        GP=heads,
        RP=max(16, heads),
        QP=max(16, heads) // heads,
        dtype=TYPES[spec.dtype],
        operand=TYPES[spec.dtype] if same else "tl.float32",
        query_dim=summary.head_dim,
        columns=prod(summary.row),
        block=summary.block,
        pool=spec.pool,
        minmax=summary.kind == "minmax",
        channels=summary.kind == "channels",
        mean=spec.reduce == "mean",
        **choice(spec),
    )


def choice(spec: Any) -> dict[str, Any]:
    """The symbols of choice.jinja: how many entries, which always, and what they must hold."""
    names = ("width", "sinks", "recent", "scale", "mass", "probabilities")
    return {name: getattr(spec, name) for name in names}


@lru_cache(maxsize=1024)
def select(spec: SelectionSpec, block_n: int | None = None, warps: int | None = None) -> Select:
    """The selection of ``spec``: ``selection_reference.select`` without its first argument.

    ``call(q, summary, lens, first=None, channels=None) -> index``; lens on the CPU, q of any strides. block_n, warps:
    of a tile of scores; None takes those of ``tile``. Raises ``ValueError`` for a spec that ``supports`` refuses; the
    returned function raises it for a summary with too few rows, or with another dtype or layout than the spec's.
    """
    if reason := supports(spec):
        raise ValueError(reason)
    size, usual = tile(spec)
    return partial(_select, spec, False, block_n or size, warps or usual)


@lru_cache(maxsize=1024)
def scores(spec: SelectionSpec) -> Select:
    """The scores alone, from the same kernels: ``selection_reference.scores`` without its first argument."""
    if reason := supports(spec):
        raise ValueError(reason)
    return partial(_select, spec, True, *tile(spec))


def _select(
    spec: SelectionSpec,
    scored: bool,
    size: int,
    warps: int,
    q: Tensor,
    summary: Tensor,
    lens: Tensor,
    first: Tensor | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    start, end, _ = lens.tolist()
    batch, heads, n, dim = q.shape
    heads //= spec.group
    rows, blocks = -(-end // spec.summary.block), -(-end // spec.block)
    if rows > summary.shape[2]:
        raise ValueError(
            f"the summary has {summary.shape[2]} rows, but the cache holds {rows} blocks: "
            "summarise every key that is appended"
        )
    values: dict[str, Any] = {
        "summary": summary,
        "first": on_device(first, q.device),
        "start": start,
        "end": end,
        "Q": n,
    }
    values["channels"] = summaries.checked_channels(spec.summary, channels)
    values["s_b"], values["s_h"] = summaries.summary_strides(spec.summary, summary)
    values["q"], *strides = rows_in_units(q.to(DTYPES[spec.dtype]), dim)
    values |= zip(("q_b", "q_h", "q_t"), strides, strict=True)
    values["out"] = q.new_empty((batch, heads, spec.width), dtype=torch.int32)
    got = values["scores"] = q.new_empty((batch, heads, blocks), dtype=torch.float32)
    if scored:
        got.fill_(-torch.inf)
    if spec.probabilities:
        values["logits"] = q.new_empty((batch, heads, n * spec.group, rows), dtype=torch.float32)
    _, processors = device_facts(q.device)
    module = load(generate(spec), "selection")
    each, step_warps = step(blocks)
    splits = split_count(rows, size, batch * heads, processors)
    with torch.cuda.device_of(q):
        if splits == 1 and blocks <= FEW_BLOCKS:
            arguments = (values[name] for name in parameters(spec))
            module.select[(1, heads, batch)](*arguments, BN=size, BC=each, num_warps=warps, num_stages=2)
        else:
            arguments = (values[name] for name in score_parameters(spec))
            module.score[(splits, heads, batch)](*arguments, BN=size, num_warps=warps, num_stages=2)
            arguments = (values[name] for name in choose_parameters(spec))
            tiles = {"BC": each} | ({"BN": size} if spec.probabilities else {})
            module.choose[(1, heads, batch)](*arguments, **tiles, num_warps=step_warps)
    return got if scored else values["out"]
