"""Fresh random inputs for a spec at a shape, with which a candidate is checked and timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import kv_format, selection_reference, sparse_reference
from .candidates import Spec
from .fused_spec import FusedSpec, Gather, Linear
from .selection_spec import SelectionSpec
from .sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from .spec import DTYPES, AttentionSpec, KVFormat, LinearSpec

# Scores of this standard deviation let a few keys carry much of the weight: a kernel that skips or repeats one is off
# by more than the tolerance, where flat weights would hide it.
SCORE_SPREAD = 3.0
# Part of the blocks or tokens that an index lists.
DENSITY = 0.25
# Room beyond the tokens of a shape, in slots, so that a kernel that reads too far finds NaN.
SLACK = 70


def make(spec: Spec, shape: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    """Arguments of the reference of ``spec``, behind the spec, on ``device``; equal seeds, equal values.

    shape: B, H_kv, Q, S for decode, where S counts the tokens attended, the Q new ones included; B, H_kv, S for
    prefill; M, K, N for linear layers, M at most the spec's rows, and for MLPs, where N counts neurons, half of which
    are listed; none for fused, whose spec says all; B, H_kv, Q, S for select, S slots being stored. Unused slots of
    buffers are NaN. Raises ``ValueError`` for a shape that lacks a symbol.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(spec, LinearSpec):
        return _linear(spec, generator, *_sizes(shape, "M", "K", "N"))
    if isinstance(spec, SparseMlpSpec):
        return _sparse_mlp(spec, generator, *_sizes(shape, "M", "K", "N"))
    if isinstance(spec, ThresholdLinearSpec):
        return _threshold_linear(spec, generator, *_sizes(shape, "M", "K", "N"))
    if isinstance(spec, FusedSpec):
        return (_fused(spec, generator),)
    if isinstance(spec, SelectionSpec):
        return _select(spec, generator, *_sizes(shape, "B", "H_kv", "Q", "S"))
    if spec.phase == "prefill":
        return _prefill(spec, generator, *_sizes(shape, "B", "H_kv", "S"))
    return _decode(spec, generator, *_sizes(shape, "B", "H_kv", "Q", "S"))


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with tensors of their own, since a decode call writes to some of them."""
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def results(spec: Spec, returned: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Everything a call with ``args`` is responsible for: what it returned, and what it left in the cache.

    Stored tokens are read back as ``[B, H_kv, S, D]``, so that they can be compared between implementations. Of a
    choice of blocks, these are the scores of the chosen, best first, and their number: which of two equals is taken is
    for the order of summation to say.
    """
    if isinstance(spec, SelectionSpec):
        return _chosen(spec, returned, args)
    found = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    if isinstance(spec, AttentionSpec) and spec.phase == "decode":
        q, _, _, k_buf, v_buf, lens, _, positions = args[:8]
        end = int(lens[1]) + q.shape[2]
        for fmt, buf in ((spec.key_format, k_buf), (spec.value_format, v_buf)):
            if fmt.kind == "latent":
                done = fmt.quantised(end)
                found += [
                    kv_format.blocks(fmt, buf)[0].flatten(2, 3)[:, :, :done],
                    kv_format.tail(fmt, buf)[:, :, : end - done],
                ]
            elif fmt.kind != "empty":
                found.append(kv_format.read(fmt, buf, 0, end, end))
        if positions is not None:
            found.append(positions[..., :end])
    return found


def tolerances(spec: Spec, device: torch.device) -> list[float]:
    """How far each of ``results`` may be from the reference's, over the largest value of the reference's.

    float32: another order of summation; tensor cores of a GPU round factors to 10 bits. bfloat16 and float16: a few
    roundings of probabilities and results; with codes, the reference's dequantised keys and values are rounded too.
    Stored codes may differ by one.
    """
    exact = {"float32": 1e-4 if device.type == "cpu" else 3e-3, "bfloat16": 2e-2, "float16": 4e-3}[spec.dtype]
    if isinstance(spec, FusedSpec):
        return [exact] * len(spec.outputs)
    if isinstance(spec, SelectionSpec):
        # Of the products of what is stored, which are exact in float32: the order of summation remains.
        return [1e-4 if device.type == "cpu" else 3e-3, 0.0]
    if not isinstance(spec, AttentionSpec):
        return [exact]
    quantised = spec.key_format.is_quantised or spec.value_format.is_quantised
    found = [exact * (2 if quantised else 1)] * (1 + spec.lse + spec.mass)
    if spec.phase == "decode":
        for fmt in (spec.key_format, spec.value_format):
            if fmt.kind == "latent":
                found += [0.0, 0.0]
            elif fmt.kind != "empty":
                # The outer steps of a Gaussian table are the widest, up to 0.7 of its largest number.
                step = 1.0 if fmt.codebook == "gaussian" else 2.0 / (2**fmt.bits - 1) if fmt.is_quantised else 0.0
                found.append(exact + step if fmt.is_quantised else 0.0)
        if spec.positions:
            found.append(0.0)
    return found


def _sizes(shape: Mapping[str, int], *names: str) -> list[int]:
    missing = [name for name in names if name not in shape]
    if missing:
        raise ValueError(f"the shape needs {', '.join(names)}; found {dict(shape)}: add {', '.join(missing)}")
    return [shape[name] for name in names]


def _normal(dtype: torch.dtype, generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device).to(dtype)


def _queries(spec: AttentionSpec, generator: torch.Generator, batch: int, heads: int, tokens: int) -> Tensor:
    # Strided as models pass them: [B, Q, H, D] transposed.
    q = _normal(torch.float32, generator, batch, tokens, heads * spec.group, spec.head_dim)
    spread = SCORE_SPREAD / (spec.scale * spec.head_dim**0.5)
    return (q * spread).to(DTYPES[spec.dtype]).transpose(1, 2)


def _tokens(
    dtype: str, generator: torch.Generator, batch: int, heads: int, tokens: int, dim: int, *, strided: bool = True
) -> Tensor:
    if strided:
        return _normal(DTYPES[dtype], generator, batch, tokens, heads, dim).transpose(1, 2)
    return _normal(DTYPES[dtype], generator, batch, heads, tokens, dim)


def _linear(spec: LinearSpec, generator: torch.Generator, m: int, k: int, n: int) -> tuple[Any, ...]:
    dtype = DTYPES[spec.dtype]
    bias = _normal(dtype, generator, n) if spec.bias else None
    return _normal(dtype, generator, min(m, spec.rows), k), [_normal(dtype, generator, n, k)], [bias]


def _fused(spec: FusedSpec, generator: torch.Generator) -> list[Tensor]:
    """Weights so small that sums stay near one through all layers; indexes within the rows that they choose from."""
    rows = {step.index: spec.inputs[step.x].shape[0] for step in spec.steps if isinstance(step, Gather)}
    inner = {step.weight: spec.inputs[step.weight].shape[not step.by_columns] for step in _linear_steps(spec)}
    found = []
    for i, item in enumerate(spec.inputs):
        if item.kind == "index":
            index = torch.randint(0, rows.get(i, 1), item.shape, generator=generator, device=generator.device)
            found.append(index)
        else:
            value = _normal(torch.float32, generator, *item.shape) / inner.get(i, 1) ** 0.5
            found.append(value.to(DTYPES[spec.dtype]))
    return found


def _linear_steps(spec: FusedSpec) -> list[Linear]:
    return [step for step in spec.steps if isinstance(step, Linear)]


def _select(
    spec: SelectionSpec, generator: torch.Generator, batch: int, heads: int, new: int, tokens: int
) -> tuple[Any, ...]:
    device, kept = generator.device, spec.summary
    q = _normal(DTYPES[spec.dtype], generator, batch, new, heads * spec.group, kept.head_dim).transpose(1, 2)
    summary, sums = selection_reference.allocate(kept, batch, heads, tokens + SLACK, device)
    summary.fill_(torch.nan)
    k = _tokens(kept.dtype, generator, batch, heads, tokens, kept.head_dim)
    channels = None
    if kept.kind == "channels":
        order = torch.rand((batch, heads, kept.head_dim), generator=generator, device=device).argsort(-1)
        channels = order[..., : kept.channels].int().contiguous()
    first = torch.arange(batch, device=device).clamp(max=max(tokens - 1, 0))
    selection_reference.summarise(kept, k, summary, sums, torch.tensor([0, 0, 0]), first, channels)
    return q, summary, torch.tensor([0, tokens, tokens]), first, channels


def _chosen(spec: SelectionSpec, index: Tensor, args: tuple[Any, ...]) -> list[Tensor]:
    """Scores of the chosen blocks, best first, zero for none; the number of different ones, -1 for one out of range."""
    found = selection_reference.scores(spec, *args)
    outside = ((index < -1) | (index >= found.shape[-1])).any(-1)
    listed = index.clamp(-1, found.shape[-1] - 1).long()
    marks = torch.zeros(*found.shape[:2], found.shape[-1] + 1, device=index.device)
    # The column behind the others takes the entries that are none.
    marks.scatter_(2, torch.where(listed < 0, found.shape[-1], listed), 1.0)
    marks = marks[..., :-1]
    best = torch.where(marks > 0, found, 0.0).sort(-1, descending=True).values
    return [best, torch.where(outside, -1.0, marks.sum(-1))]


def _sparse_mlp(spec: SparseMlpSpec, generator: torch.Generator, m: int, k: int, n: int) -> tuple[Any, ...]:
    dtype = DTYPES[spec.dtype]
    gate, up = (_normal(dtype, generator, n, k) / k**0.5 for _ in range(2))
    weights = sparse_reference.by_neuron(gate, up, _normal(dtype, generator, k, n))
    half = torch.randperm(n, generator=generator, device=generator.device)[None, : -(-n // 2)]
    return _normal(dtype, generator, m, k), *weights, half.int()


def _threshold_linear(spec: ThresholdLinearSpec, generator: torch.Generator, m: int, k: int, n: int) -> tuple[Any, ...]:
    dtype = DTYPES[spec.dtype]
    bias = _normal(dtype, generator, n) if spec.bias else None
    threshold = torch.full((1,), 0.67, device=generator.device)  # half of what is normal
    return _normal(dtype, generator, m, k), [_normal(dtype, generator, k, n)], [bias], [threshold]


def _prefill(spec: AttentionSpec, generator: torch.Generator, batch: int, heads: int, tokens: int) -> tuple[Any, ...]:
    q = _queries(spec, generator, batch, heads, tokens)
    k, v = (
        _tokens(fmt.dtype, generator, batch, heads, tokens, fmt.head_dim)
        for fmt in (spec.key_format, spec.value_format)
    )
    mask = _mask(spec, batch, tokens, tokens, generator)
    if spec.index == "contiguous":
        return q, k, v, mask
    blocks = -(-tokens // spec.index_block)
    index = _causal_index(batch, heads * spec.group, blocks, generator)
    return q, k, v, mask, index


def _decode(
    spec: AttentionSpec, generator: torch.Generator, batch: int, heads: int, new: int, tokens: int
) -> tuple[Any, ...]:
    device, filled = generator.device, max(tokens - new, 0)
    q = _queries(spec, generator, batch, heads, new)
    formats = spec.key_format, spec.value_format
    fresh = [_tokens(fmt.dtype, generator, batch, heads, new, fmt.width) for fmt in formats]
    buffers = []
    for fmt in formats:
        buf = _poisoned(fmt, batch, heads, filled + new + SLACK, device)
        old = _tokens(fmt.dtype, generator, batch, heads, filled, fmt.width, strided=False)
        kv_format.append(fmt, buf, 0, old)
        buffers.append(buf)
    logical, positions = filled, None
    if spec.positions:
        # As if tokens behind the first few had been evicted.
        gap, kept = 17, min(4, filled)
        logical = filled + gap
        slots = torch.arange(kv_format.capacity(spec.key_format, buffers[0]), device=device, dtype=torch.int32)
        positions = torch.where(slots < kept, slots, slots + gap).expand(batch, heads, -1).contiguous()
    lens = torch.tensor([0, filled, logical])
    mask = _mask(spec, batch, new, logical + new, generator)
    args: tuple[Any, ...] = (q, *fresh, *buffers, lens, mask, positions)
    latent = any(fmt.kind == "latent" for fmt in formats)
    if spec.index == "contiguous" and not spec.head_windows and not latent and spec.rotary == "none":
        return args
    index = None
    if spec.index != "contiguous":
        size = spec.index_block if spec.index == "blocks" else 1
        index = _index(batch, heads, -(-max(filled, 1) // size), generator)
    bound = (torch.arange(heads, device=device) % 2).int() if spec.head_windows else None
    if latent:
        return (*args, index, bound, None, None, *_rebuilding(spec, generator, heads, logical + new))
    if spec.rotary == "none":
        return (*args, index, bound)
    # Strided as slices of wider tables, which no model passes but a kernel must take.
    tables = torch.randn((2, batch, new, 2 * spec.rotary_dim), generator=generator, device=device)[..., ::2]
    return (*args, index, bound, *tables.to(DTYPES[spec.dtype]))


def _rebuilding(spec: AttentionSpec, generator: torch.Generator, heads: int, columns: int) -> tuple[Tensor | None, ...]:
    """Projection and rotary table of latent keys, and the projection of latent values; None where there are none."""

    def projection(fmt: KVFormat) -> Tensor | None:
        if fmt.kind != "latent":
            return None
        return _normal(torch.float32, generator, heads, heads * fmt.rank, fmt.head_dim) / (heads * fmt.rank) ** 0.5

    angles = torch.arange(columns, device=generator.device)[:, None] * 0.1
    angles = angles * torch.linspace(1.0, 0.01, spec.head_dim // 2, device=generator.device).repeat(2)
    return (
        projection(spec.key_format),
        torch.stack([angles.cos(), angles.sin()])[:, None],
        projection(spec.value_format),
    )


def _mask(spec: AttentionSpec, batch: int, queries: int, columns: int, generator: torch.Generator) -> Tensor | None:
    """Left padding of row b by b tokens, and the future hidden; "additive" carries finite biases as well."""
    if spec.mask == "none":
        return None
    device = generator.device
    column = torch.arange(columns, device=device)
    padding = torch.arange(batch, device=device)[:, None, None, None].clamp(max=max(columns - queries - 1, 0))
    last = torch.arange(columns - queries, columns, device=device)[None, None, :, None]
    allowed = (column >= padding) & (column <= last)
    if spec.mask == "bool":
        return allowed
    dtype = DTYPES[spec.dtype]
    bias = _normal(dtype, generator, batch, 1, queries, columns)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)


def _index(batch: int, heads: int, entries: int, generator: torch.Generator) -> Tensor:
    """int32 ``[B, H_kv, N]``: a quarter of the entries, ascending, and an empty one at the end."""
    count = max(1, int(entries * DENSITY))
    order = torch.rand((batch, heads, entries), generator=generator, device=generator.device).argsort(-1)
    listed = order[..., :count].sort(-1).values.int()
    return torch.nn.functional.pad(listed, (0, 1), value=-1)


def _causal_index(batch: int, heads: int, blocks: int, generator: torch.Generator) -> Tensor:
    """int32 ``[B, H, blocks, N]``: for every block of queries itself and a part of those before, else -1."""
    count = max(1, int(blocks * DENSITY))
    device = generator.device
    scores = torch.rand((batch, heads, blocks, blocks), generator=generator, device=device)
    keys, queries = torch.arange(blocks, device=device), torch.arange(blocks, device=device)[:, None]
    scores = scores.masked_fill(keys > queries, -1.0).masked_fill(keys == queries, 2.0)
    best = scores.topk(count, -1)
    return torch.where(best.values < 0, -1, best.indices).int()


def _poisoned(fmt: KVFormat, batch: int, heads: int, slots: int, device: torch.device) -> Tensor:
    """A buffer whose every slot reads as NaN; of codes, the tail, the scales and the minima do."""
    buf = kv_format.allocate(fmt, batch, heads, slots, device)
    return buf.fill_(255 if buf.dtype == torch.uint8 else torch.nan)
