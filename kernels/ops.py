"""The custom operators (namespace ``torchaccel``) under which kernels stand in a compiled graph."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import kv_format, mixed_precision, ragged, registry, shared_prefix, sparse_prompt, sparse_regions, staging
from .fused_spec import FusedSpec
from .gather_spec import GatherSpec
from .pick import Pick
from .plan import Plan
from .selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from .shared_prefix import Level
from .sparse_prompt import SparsePrompt
from .sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from .spec import AttentionSpec, dtype_name

# Output, log-sum-exp, mass.
Results = tuple[Tensor, Tensor, Tensor]

_SCHEMAS = {
    "attend": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, Tensor? mask, "
    "Tensor(c!)? positions, str plan) -> Tensor",
    "attend_with": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, Tensor? index, Tensor? head_windows, str plan) -> (Tensor, Tensor, Tensor)",
    "attend_listed": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, Tensor index, int least, str plan, str whole) -> Tensor",
    "attend_choosing": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, int count, int least, str plan, str whole) -> (Tensor, Tensor)",
    "attend_shared": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor[] prefixes, str plan, str prefix_plan) -> Tensor",
    "attend_rotary": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, Tensor cos, Tensor sin, str plan) -> Tensor",
    "attend_latents": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, Tensor? projection, Tensor? table, Tensor? value_projection, str plan) "
    "-> Tensor",
    "attend_mixed": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!) positions, Tensor[] classes, str plan, str high_plan, str low_plan) -> Tensor",
    "extend_rotary": "(Tensor(a!) table, Tensor cos, Tensor sin, Tensor lens) -> ()",
    "attend_ragged": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor lens, "
    "Tensor? mask, Tensor positions, Tensor table, Tensor tails, Tensor? head_windows, str plan) -> Tensor",
    "attend_static": "(Tensor q, Tensor k, Tensor v, Tensor? mask, str plan) -> Tensor",
    "attend_prompt": "(Tensor q, Tensor k, Tensor v, Tensor? mask, str plan) -> Tensor",
    "attend_prompt_with": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? index, Tensor? head_windows, "
    "str plan) -> (Tensor, Tensor, Tensor)",
    "attend_prompt_sparse": "(Tensor q, Tensor k, Tensor v, Tensor? mask, str plan) -> (Tensor, Tensor, Tensor)",
    "attend_regions": "(Tensor q, Tensor k, Tensor v, SymInt[] grid, str plan) -> (Tensor, Tensor)",
    "linear_rows": "(Tensor x, Tensor[] weights, Tensor?[] biases, str pick) -> Tensor[]",
    "fused_rows": "(Tensor[] inputs, str pick) -> Tensor[]",
    "gather_tokens": "(Tensor[] inputs, Tensor index, str spec) -> Tensor[]",
    "sparse_mlp": "(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? neurons, str activation) -> Tensor",
    "threshold_linear": "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] thresholds) -> Tensor[]",
    "summarise_keys": "(Tensor k_new, Tensor(a!) summary, Tensor(b!) sums, Tensor lens, Tensor? first, "
    "Tensor? channels, str spec) -> ()",
    "select_blocks": "(Tensor q, Tensor summary, Tensor lens, Tensor? first, Tensor? channels, str pick) -> Tensor",
    "select_prompt_blocks": "(Tensor q, Tensor k, Tensor? first, str spec) -> Tensor",
}


@lru_cache(maxsize=1)
def library() -> torch.library.Library:
    """Define the operators on first use (never at import) and return the library that keeps them alive."""
    lib = torch.library.Library("torchaccel", "DEF")
    for name, schema in _SCHEMAS.items():
        lib.define(name + schema)
    # Library.impl costs 2.5 us a call, custom_op 8 us: with one call per layer and step that matters.
    for key in ("CPU", "CUDA"):
        lib.impl("attend", _attend, key)
        lib.impl("attend_with", _attend_with, key)
        lib.impl("attend_listed", _attend_listed, key)
        lib.impl("attend_choosing", _attend_choosing, key)
        lib.impl("attend_shared", _attend_shared, key)
        lib.impl("attend_rotary", _attend_rotary, key)
        lib.impl("attend_latents", _attend_latents, key)
        lib.impl("attend_mixed", _attend_mixed, key)
        lib.impl("extend_rotary", _extend_rotary, key)
        lib.impl("attend_ragged", _attend_ragged, key)
        lib.impl("attend_static", _attend_static, key)
        lib.impl("attend_prompt_with", _attend_prompt_with, key)
        lib.impl("attend_prompt", _attend_prompt, key)
        lib.impl("attend_prompt_sparse", _attend_prompt_sparse, key)
        lib.impl("attend_regions", _attend_regions, key)
        lib.impl("linear_rows", _linear_rows, key)
        lib.impl("fused_rows", _fused_rows, key)
        lib.impl("gather_tokens", _gather_tokens, key)
        lib.impl("sparse_mlp", _sparse_mlp, key)
        lib.impl("threshold_linear", _threshold_linear, key)
        lib.impl("summarise_keys", _summarise_keys, key)
        lib.impl("select_blocks", _select_blocks, key)
        lib.impl("select_prompt_blocks", _select_prompt_blocks, key)
    for name in (
        "attend",
        "attend_listed",
        "attend_shared",
        "attend_rotary",
        "attend_latents",
        "attend_mixed",
        "attend_ragged",
        "attend_static",
        "attend_prompt",
    ):
        torch.library.register_fake(f"torchaccel::{name}", _like_query, lib=lib)
    torch.library.register_fake("torchaccel::attend_with", _attend_with_fake, lib=lib)
    torch.library.register_fake("torchaccel::attend_choosing", _attend_choosing_fake, lib=lib)
    torch.library.register_fake("torchaccel::attend_prompt_with", _attend_prompt_with_fake, lib=lib)
    torch.library.register_fake("torchaccel::attend_prompt_sparse", _attend_prompt_sparse_fake, lib=lib)
    torch.library.register_fake("torchaccel::attend_regions", _attend_regions_fake, lib=lib)
    torch.library.register_fake("torchaccel::linear_rows", _linear_fake, lib=lib)
    torch.library.register_fake("torchaccel::fused_rows", _fused_fake, lib=lib)
    torch.library.register_fake("torchaccel::gather_tokens", _gather_tokens_fake, lib=lib)
    torch.library.register_fake("torchaccel::sparse_mlp", _sparse_mlp_fake, lib=lib)
    torch.library.register_fake("torchaccel::threshold_linear", _threshold_linear_fake, lib=lib)
    torch.library.register_fake("torchaccel::summarise_keys", lambda *_: None, lib=lib)
    torch.library.register_fake("torchaccel::extend_rotary", lambda *_: None, lib=lib)
    torch.library.register_fake("torchaccel::select_blocks", _select_blocks_fake, lib=lib)
    torch.library.register_fake("torchaccel::select_prompt_blocks", _select_prompt_blocks_fake, lib=lib)
    return lib


# A step calls an operator per layer, so what is looked up is keyed by what costs nothing to compare: hashing the specs
# took 1 us a call.
@lru_cache(maxsize=4096)
def _picked_run(kernel: str, pick: str, device: str) -> Any:
    return registry.picked(kernel, pick, device)


@lru_cache(maxsize=4096)
def _gather_run(spec: str, device: str) -> Any:
    return registry.gather_tokens(GatherSpec.from_key(spec), device).run


@lru_cache(maxsize=4096)
def _sparse_mlp_run(dtype: torch.dtype, rows: int, activation: Any, device: str) -> Any:
    return registry.sparse_mlp(SparseMlpSpec(dtype_name(dtype), rows, activation), device).run


@lru_cache(maxsize=4096)
def _threshold_linear_run(dtype: torch.dtype, rows: int, bias: bool, device: str) -> Any:
    return registry.threshold_linear(ThresholdLinearSpec(dtype_name(dtype), rows, bias), device).run


@lru_cache(maxsize=4096)
def _summarise_run(spec: str, device: str) -> Any:
    return registry.summarise(SummarySpec.from_key(spec), device).run


def _attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    plan: str,
) -> Tensor:
    out: Tensor = _kernel(plan, q, k_buf)(q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
    return out


def _kernel(plan: str, q: Tensor, buf: Tensor) -> Any:
    """The callable of a plan, for buffers in host memory, too."""
    run = registry.attend(plan)
    return partial(staging.attend_whole, run) if staging.is_away(q, buf) else run


def _attend_with(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    index: Tensor | None,
    head_windows: Tensor | None,
    plan: str,
) -> Results:
    run = registry.attend(plan)
    results = run(q, k_new, v_new, k_buf, v_buf, lens, mask, positions, index, head_windows)
    return _three(results, Plan.from_key(plan).spec)


def _attend_listed(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    index: Tensor,
    least: int,
    plan: str,
    whole: str,
) -> Tensor:
    """Attention to what ``index`` lists; by the plan ``whole``, to everything, up to ``least`` stored tokens."""
    args = (q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
    if int(lens[1]) + q.shape[2] <= least:
        return _attend(*args, whole)
    if staging.is_away(q, k_buf):
        return staging.attend(registry.attend_staged(plan), Plan.from_key(plan).spec, *args, index)
    out: Tensor = registry.attend(plan)(*args, index)
    return out


def _attend_choosing(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    count: int,
    least: int,
    plan: str,
    whole: str,
) -> tuple[Tensor, Tensor]:
    """Attention to everything, and the ``count`` stored tokens that received most of it, int32 ``[B, H_kv, count]``.

    The new token is no candidate: whoever reads the list reads it anyway. Up to ``least`` stored tokens nothing is
    chosen, and the plan is ``whole``, which does not tell the mass.
    """
    args = (q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
    stored = int(lens[1])
    if stored + q.shape[2] <= least:
        return _attend(*args, whole), q.new_empty((q.shape[0], k_new.shape[1], count), dtype=torch.int32)
    out, mass = registry.attend(plan)(*args)
    return out, registry.top_tokens(q.device.type)(mass, stored, count)


def _attend_shared(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    prefixes: list[Tensor],
    plan: str,
    prefix_plan: str,
) -> Tensor:
    """lens: int64 ``[1 + levels, 3]``, of the own buffers and of each prefix; prefixes: keys, values of every level."""
    tokens = [end for _, end, _ in lens.tolist()[1:]]
    levels = [Level(*level) for level in zip(prefixes[::2], prefixes[1::2], tokens, strict=True)]
    kernels = registry.attend(plan), registry.attend(prefix_plan)
    return shared_prefix.attend(*kernels, levels, q, k_new, v_new, k_buf, v_buf, lens[0], mask)


def _attend_rotary(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    plan: str,
) -> Tensor:
    run = _kernel(plan, q, k_buf)
    out: Tensor = run(q, k_new, v_new, k_buf, v_buf, lens, mask, positions, None, None, cos, sin)
    return out


def _attend_latents(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    projection: Tensor | None,
    table: Tensor | None,
    value_projection: Tensor | None,
    plan: str,
) -> Tensor:
    """k_new, v_new: with their latents behind them; projections and table: see ``latents.rebuild``."""
    rebuilding = None, None, None, None, projection, table, value_projection
    out: Tensor = registry.attend(plan)(q, k_new, v_new, k_buf, v_buf, lens, mask, positions, *rebuilding)
    return out


def _attend_mixed(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    classes: list[Tensor],
    plan: str,
    high_plan: str,
    low_plan: str,
) -> Tensor:
    """lens: int64 ``[3, 3]``, of the newest tokens and of each class; classes: keys, values, positions of each."""
    tokens = [end for _, end, _ in lens.tolist()[1:]]
    parts = zip(classes[::3], classes[1::3], tokens, classes[2::3], strict=True)
    members = [mixed_precision.TokenClass(*part) for part in parts]
    kernels = [registry.attend(of) for of in (high_plan, low_plan, plan)]
    return mixed_precision.attend(kernels, members, q, k_new, v_new, k_buf, v_buf, lens[0], mask, positions)


def _extend_rotary(table: Tensor, cos: Tensor, sin: Tensor, lens: Tensor) -> None:
    """Write the rows of new columns into a table ``[2, B, C, R]``; cos, sin: ``[B | 1, .., n, R]``."""
    tokens, size = cos.shape[-2:]
    first = int(lens[2])
    for part, new in zip(table, (cos, sin), strict=True):
        part[:, first : first + tokens] = new.reshape(-1, tokens, size)


def _attend_ragged(q: Tensor, *rest: Any) -> Tensor:
    *arguments, plan = rest
    given = (q, *arguments, registry.append_pages(q.device.type))
    return ragged.attend(registry.attend(plan), *given)


def _attend_static(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: str) -> Tensor:
    rows, slots = q.shape[2], k.shape[2]
    lens = torch.tensor([0, slots, slots - rows])
    out: Tensor = registry.attend(plan)(q, None, None, k, v, lens, mask, None)
    return out


def _attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: str) -> Tensor:
    out: Tensor = registry.attend_prompt(plan)(q, k, v, mask)
    return out


def _attend_prompt_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    head_windows: Tensor | None,
    plan: str,
) -> Results:
    return _three(registry.attend_prompt(plan)(q, k, v, mask, index, head_windows), Plan.from_key(plan).spec)


def _attend_prompt_sparse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: str) -> Results:
    """Output, mass, and the share of causal pairs that was read."""
    chosen = SparsePrompt.from_key(plan)
    results, share = sparse_prompt.attend(chosen, q, k, v, mask)
    out, _, mass = _three(results, chosen.sparse.spec)
    return out, mass, share


def _attend_regions(q: Tensor, k: Tensor, v: Tensor, grid: list[int], plan: str) -> tuple[Tensor, Tensor]:
    """Output, and the share of all pairs that was read; grid: rows and columns of patches."""
    rows, columns = grid
    return sparse_regions.attend(SparsePrompt.from_key(plan), q, k, v, (rows, columns))


def _three(results: Any, spec: AttentionSpec) -> Results:
    """Output, log-sum-exp and mass; empty what the spec does not ask for: an operator returns what it declares."""
    out, *sides = results if isinstance(results, tuple) else (results,)
    lse = sides.pop(0) if spec.lse else out.new_empty(0, dtype=torch.float32)
    mass = sides.pop(0) if spec.mass else out.new_empty(0, dtype=torch.float32)
    return out, lse, mass


def _linear_rows(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], pick: str) -> list[Tensor]:
    return _picked_run("linear", pick, x.device.type)(x, weights, biases)


def _fused_rows(inputs: list[Tensor], pick: str) -> list[Tensor]:
    return _picked_run("fused", pick, inputs[0].device.type)(inputs)


def _gather_tokens(inputs: list[Tensor], index: Tensor, spec: str) -> list[Tensor]:
    return _gather_run(spec, index.device.type)(inputs, index)


def _sparse_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor | None, activation: str) -> Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    out: Tensor = _sparse_mlp_run(x.dtype, rows, activation, x.device.type)(x, gate, up, down, neurons)
    return out


def _threshold_linear(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], thresholds: list[Tensor]
) -> list[Tensor]:
    rows = x.numel() // max(x.shape[-1], 1)
    bias = biases.count(None) < len(biases)
    return _threshold_linear_run(x.dtype, rows, bias, x.device.type)(x, weights, biases, thresholds)


def _summarise_keys(
    k_new: Tensor, summary: Tensor, sums: Tensor, lens: Tensor, first: Tensor | None, channels: Tensor | None, spec: str
) -> None:
    _summarise_run(spec, k_new.device.type)(k_new, summary, sums, lens, first, channels)


def _select_blocks(
    q: Tensor, summary: Tensor, lens: Tensor, first: Tensor | None, channels: Tensor | None, pick: str
) -> Tensor:
    return _picked_run("select", pick, q.device.type)(q, summary, lens, first, channels)


def _select_prompt_blocks(q: Tensor, k: Tensor, first: Tensor | None, spec: str) -> Tensor:
    run = registry.select_prompt(PromptSelectionSpec.from_key(spec), q.device.type).run
    return run(q, k, first)


def _attend_with_fake(q: Tensor, k_new: Tensor, v_new: Tensor, k_buf: Tensor, *rest: Any) -> Results:
    spec = Plan.from_key(rest[-1]).spec
    return _fakes(q, k_new.shape[1], kv_format.capacity(spec.key_format, k_buf), spec)


def _attend_choosing_fake(q: Tensor, k_new: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = rest[-4]
    return _like_query(q), q.new_empty((q.shape[0], k_new.shape[1], count), dtype=torch.int32)


def _attend_prompt_with_fake(q: Tensor, k: Tensor, *rest: Any) -> Results:
    return _fakes(q, k.shape[1], k.shape[2], Plan.from_key(rest[-1]).spec)


def _attend_prompt_sparse_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: str) -> Results:
    out, _, mass = _fakes(q, k.shape[1], k.shape[2], SparsePrompt.from_key(plan).sparse.spec)
    return out, mass, q.new_empty((), dtype=torch.float32)


def _attend_regions_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_query(q), q.new_empty((), dtype=torch.float32)


def _fakes(q: Tensor, kv_heads: int, slots: int, spec: AttentionSpec) -> Results:
    lse = q.new_empty(q.shape[:3] if spec.lse else (0,), dtype=torch.float32)
    mass = q.new_empty((q.shape[0], kv_heads, slots) if spec.mass else (0,), dtype=torch.float32)
    return _like_query(q), lse, mass


def _like_query(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _linear_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], pick: str) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


def _fused_fake(inputs: list[Tensor], pick: str) -> list[Tensor]:
    spec = Pick.from_key("fused", pick).spec
    assert isinstance(spec, FusedSpec)
    return [inputs[0].new_empty(out.shape) for out in spec.outputs]


def _gather_tokens_fake(inputs: list[Tensor], index: Tensor, spec: str) -> list[Tensor]:
    found = GatherSpec.from_key(spec)
    shapes = [found.shape(item, x.shape, index.shape) for item, x in zip(found.items, inputs, strict=True)]
    return [x.new_empty(shape) for x, shape in zip(inputs, shapes, strict=True)]


def _sparse_mlp_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _threshold_linear_fake(x: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[1])) for w in weights]


def _select_blocks_fake(
    q: Tensor, summary: Tensor, lens: Tensor, first: Tensor | None, channels: Tensor | None, pick: str
) -> Tensor:
    spec = Pick.from_key("select", pick).spec
    assert isinstance(spec, SelectionSpec)
    return q.new_empty((q.shape[0], summary.shape[1], spec.width), dtype=torch.int32)


def _select_prompt_blocks_fake(q: Tensor, k: Tensor, first: Tensor | None, spec: str) -> Tensor:
    chosen = PromptSelectionSpec.from_key(spec)
    blocks = (q.shape[2] + chosen.block - 1) // chosen.block
    return q.new_empty((*q.shape[:2], blocks, chosen.width or blocks), dtype=torch.int32)
