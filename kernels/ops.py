"""The custom operators (namespace ``torchaccel``) under which kernels stand in a compiled graph."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import kv_format, registry, shared_prefix, sparse_prompt
from .fused_spec import FusedSpec
from .plan import Plan
from .selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from .shared_prefix import Level
from .sparse_prompt import SparsePrompt
from .spec import AttentionSpec, LinearSpec

# Output, log-sum-exp, mass.
Results = tuple[Tensor, Tensor, Tensor]

_SCHEMAS = {
    "attend": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, Tensor? mask, "
    "Tensor(c!)? positions, str plan) -> Tensor",
    "attend_with": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, Tensor? index, Tensor? head_windows, str plan) -> (Tensor, Tensor, Tensor)",
    "attend_shared": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor[] prefixes, str plan, str prefix_plan) -> Tensor",
    "attend_rotary": "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
    "Tensor? mask, Tensor(c!)? positions, Tensor cos, Tensor sin, str plan) -> Tensor",
    "attend_static": "(Tensor q, Tensor k, Tensor v, Tensor? mask, str plan) -> Tensor",
    "attend_prompt": "(Tensor q, Tensor k, Tensor v, Tensor? mask, str plan) -> Tensor",
    "attend_prompt_with": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? index, Tensor? head_windows, "
    "str plan) -> (Tensor, Tensor, Tensor)",
    "attend_prompt_sparse": "(Tensor q, Tensor k, Tensor v, Tensor? mask, str plan) -> (Tensor, Tensor, Tensor)",
    "linear_rows": "(Tensor x, Tensor[] weights, Tensor?[] biases, str dtype) -> Tensor[]",
    "fused_rows": "(Tensor[] inputs, str spec) -> Tensor[]",
    "summarise_keys": "(Tensor k_new, Tensor(a!) summary, Tensor(b!) sums, Tensor lens, Tensor? first, "
    "Tensor? channels, str spec) -> ()",
    "select_blocks": "(Tensor q, Tensor summary, Tensor lens, Tensor? first, Tensor? channels, str spec) -> Tensor",
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
        lib.impl("attend_shared", _attend_shared, key)
        lib.impl("attend_rotary", _attend_rotary, key)
        lib.impl("attend_static", _attend_static, key)
        lib.impl("attend_prompt_with", _attend_prompt_with, key)
        lib.impl("attend_prompt", _attend_prompt, key)
        lib.impl("attend_prompt_sparse", _attend_prompt_sparse, key)
        lib.impl("linear_rows", _linear_rows, key)
        lib.impl("fused_rows", _fused_rows, key)
        lib.impl("summarise_keys", _summarise_keys, key)
        lib.impl("select_blocks", _select_blocks, key)
        lib.impl("select_prompt_blocks", _select_prompt_blocks, key)
    for name in ("attend", "attend_shared", "attend_rotary", "attend_static", "attend_prompt"):
        torch.library.register_fake(f"torchaccel::{name}", _like_query, lib=lib)
    torch.library.register_fake("torchaccel::attend_with", _attend_with_fake, lib=lib)
    torch.library.register_fake("torchaccel::attend_prompt_with", _attend_prompt_with_fake, lib=lib)
    torch.library.register_fake("torchaccel::attend_prompt_sparse", _attend_prompt_sparse_fake, lib=lib)
    torch.library.register_fake("torchaccel::linear_rows", _linear_fake, lib=lib)
    torch.library.register_fake("torchaccel::fused_rows", _fused_fake, lib=lib)
    torch.library.register_fake("torchaccel::summarise_keys", lambda *_: None, lib=lib)
    torch.library.register_fake("torchaccel::select_blocks", _select_blocks_fake, lib=lib)
    torch.library.register_fake("torchaccel::select_prompt_blocks", _select_prompt_blocks_fake, lib=lib)
    return lib


# A step calls an operator per layer, so what is looked up is keyed by what costs nothing to compare: hashing the specs
# took 1 us a call.
@lru_cache(maxsize=4096)
def _linear_run(dtype: str, rows: int, bias: bool, device: str) -> Any:
    return registry.linear(LinearSpec(dtype, rows, bias), device).run


@lru_cache(maxsize=4096)
def _fused_run(spec: str, device: str) -> Any:
    return registry.fused(FusedSpec.from_key(spec), device).run


@lru_cache(maxsize=4096)
def _summarise_run(spec: str, device: str) -> Any:
    return registry.summarise(SummarySpec.from_key(spec), device).run


@lru_cache(maxsize=4096)
def _select_run(spec: str, device: str) -> Any:
    return registry.select(SelectionSpec.from_key(spec), device).run


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
    out: Tensor = registry.attend(plan)(q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
    return out


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
    run = registry.attend(plan)
    out: Tensor = run(q, k_new, v_new, k_buf, v_buf, lens, mask, positions, None, None, cos, sin)
    return out


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


def _three(results: Any, spec: AttentionSpec) -> Results:
    """Output, log-sum-exp and mass; empty what the spec does not ask for: an operator returns what it declares."""
    out, *sides = results if isinstance(results, tuple) else (results,)
    lse = sides.pop(0) if spec.lse else out.new_empty(0, dtype=torch.float32)
    mass = sides.pop(0) if spec.mass else out.new_empty(0, dtype=torch.float32)
    return out, lse, mass


def _linear_rows(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dtype: str) -> list[Tensor]:
    rows = x.numel() // max(x.shape[-1], 1)
    bias = biases.count(None) < len(biases)
    return _linear_run(dtype, rows, bias, x.device.type)(x, weights, biases)


def _fused_rows(inputs: list[Tensor], spec: str) -> list[Tensor]:
    return _fused_run(spec, inputs[0].device.type)(inputs)


def _summarise_keys(
    k_new: Tensor, summary: Tensor, sums: Tensor, lens: Tensor, first: Tensor | None, channels: Tensor | None, spec: str
) -> None:
    _summarise_run(spec, k_new.device.type)(k_new, summary, sums, lens, first, channels)


def _select_blocks(
    q: Tensor, summary: Tensor, lens: Tensor, first: Tensor | None, channels: Tensor | None, spec: str
) -> Tensor:
    return _select_run(spec, q.device.type)(q, summary, lens, first, channels)


def _select_prompt_blocks(q: Tensor, k: Tensor, first: Tensor | None, spec: str) -> Tensor:
    run = registry.select_prompt(PromptSelectionSpec.from_key(spec), q.device.type).run
    return run(q, k, first)


def _attend_with_fake(q: Tensor, k_new: Tensor, v_new: Tensor, k_buf: Tensor, *rest: Any) -> Results:
    spec = Plan.from_key(rest[-1]).spec
    return _fakes(q, k_new.shape[1], kv_format.capacity(spec.key_format, k_buf), spec)


def _attend_prompt_with_fake(q: Tensor, k: Tensor, *rest: Any) -> Results:
    return _fakes(q, k.shape[1], k.shape[2], Plan.from_key(rest[-1]).spec)


def _attend_prompt_sparse_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: str) -> Results:
    out, _, mass = _fakes(q, k.shape[1], k.shape[2], SparsePrompt.from_key(plan).sparse.spec)
    return out, mass, q.new_empty((), dtype=torch.float32)


def _fakes(q: Tensor, kv_heads: int, slots: int, spec: AttentionSpec) -> Results:
    lse = q.new_empty(q.shape[:3] if spec.lse else (0,), dtype=torch.float32)
    mass = q.new_empty((q.shape[0], kv_heads, slots) if spec.mass else (0,), dtype=torch.float32)
    return _like_query(q), lse, mass


def _like_query(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _linear_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dtype: str) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


def _fused_fake(inputs: list[Tensor], spec: str) -> list[Tensor]:
    return [inputs[0].new_empty(out.shape) for out in FusedSpec.from_key(spec).outputs]


def _select_blocks_fake(
    q: Tensor, summary: Tensor, lens: Tensor, first: Tensor | None, channels: Tensor | None, spec: str
) -> Tensor:
    return q.new_empty((q.shape[0], summary.shape[1], SelectionSpec.from_key(spec).width), dtype=torch.int32)


def _select_prompt_blocks_fake(q: Tensor, k: Tensor, first: Tensor | None, spec: str) -> Tensor:
    chosen = PromptSelectionSpec.from_key(spec)
    blocks = (q.shape[2] + chosen.block - 1) // chosen.block
    return q.new_empty((*q.shape[:2], blocks, chosen.width or blocks), dtype=torch.int32)
