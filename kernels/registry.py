"""Which implementation runs a spec on a device: generated C++, generated Triton, stock operators, or the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

from torch import Tensor

from . import (
    fused_reference,
    gather_reference,
    kv_format,
    reference,
    rotary,
    rotation,
    selection_reference,
    sparse_reference,
)
from .candidates import Candidate, Spec, build, candidates
from .fused_spec import FusedSpec
from .gather_spec import GatherSpec
from .pick import Pick
from .plan import Plan
from .selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from .sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from .spec import AttentionSpec, KVFormat, LinearSpec
from .staging import staged_spec

# What writes the kernels of a device type: the folder of its modules.
_GENERATORS = {"cpu": "cpp", "cuda": "triton"}


@dataclass(frozen=True)
class Choice:
    """An implementation, its name ("cpp", "triton", "composed", "reference"), and why a generated one was not taken."""

    name: str
    run: Callable[..., Any]
    reason: str | None = None


@lru_cache(maxsize=256)
def linear(spec: LinearSpec, device: str) -> Choice:
    """The implementation of a few-row linear layer."""
    return _generated("linear", "linear", spec, device, reference.linear)


@lru_cache(maxsize=256)
def sparse_mlp(spec: SparseMlpSpec, device: str) -> Choice:
    """The implementation of a few-row MLP over some of its neurons."""
    return _generated("sparse_mlp", "sparse_mlp", spec, device, partial(sparse_reference.sparse_mlp, spec))


@lru_cache(maxsize=256)
def threshold_linear(spec: ThresholdLinearSpec, device: str) -> Choice:
    """The implementation of a few-row linear layer that skips small inputs."""
    return _generated("threshold_linear", "threshold_linear", spec, device, sparse_reference.threshold_linear)


@lru_cache(maxsize=1024)
def fused(spec: FusedSpec, device: str) -> Choice:
    """The implementation of a fused program over a few rows, compiled."""
    return _generated("fused", "fused", spec, device, partial(fused_reference.fused, spec))


@lru_cache(maxsize=256)
def gather_tokens(spec: GatherSpec, device: str) -> Choice:
    """The implementation of taking the same tokens of several tensors."""
    stock = partial(gather_reference.gather_tokens, spec)
    return _generated("gather_tokens", "gather_tokens", spec, device, stock)


def fused_problem(spec: FusedSpec, device: str) -> str | None:
    """Why a fused program would run on the reference, in one line; None when a kernel can be generated for it."""
    return _module("fused", spec, device)[1]


def gather_problem(spec: GatherSpec, device: str) -> str | None:
    """Why tokens would be taken by the reference, in one line; None when a kernel can be generated for it."""
    return _module("gather_tokens", spec, device)[1]


@lru_cache(maxsize=256)
def append(fmt: KVFormat, device: str) -> Choice:
    """The implementation of storing a whole prompt in a KV format."""
    reason: str | None = f"no generated kernels for device {device}"
    if device == "cpu":
        from .cpp import append as module

        reason = module.supports(fmt)
        if reason is None:
            return Choice("cpp", module.append(fmt))
    return Choice("reference", partial(kv_format.append, fmt), reason)


@lru_cache(maxsize=256)
def summarise(spec: SummarySpec, device: str) -> Choice:
    """The implementation of keeping a summary of keys up to date."""
    return _generated("summary", "summarise", spec, device, partial(selection_reference.summarise, spec))


@lru_cache(maxsize=1024)
def select(spec: SelectionSpec, device: str) -> Choice:
    """The implementation of choosing what a decode step reads."""
    return _generated("selection", "select", spec, device, partial(selection_reference.select, spec))


@lru_cache(maxsize=1024)
def scores(spec: SelectionSpec, device: str) -> Choice:
    """The implementation of scoring blocks alone."""
    return _generated("selection", "scores", spec, device, partial(selection_reference.scores, spec))


@lru_cache(maxsize=1024)
def select_prompt(spec: PromptSelectionSpec, device: str) -> Choice:
    """The implementation of choosing what every block of a prompt reads."""
    stock = partial(selection_reference.select_prompt, spec)
    return _generated("prompt_selection", "select_prompt", spec, device, stock)


@lru_cache(maxsize=1024)
def prompt_scores(spec: PromptSelectionSpec, device: str) -> Choice:
    """The implementation of the scores that ``select_prompt`` chooses by."""
    stock = partial(selection_reference.prompt_scores, spec)
    return _generated("prompt_selection", "prompt_scores", spec, device, stock)


@lru_cache(maxsize=4)
def block_lists(device: str) -> Callable[..., Tensor]:
    """The implementation of lists of blocks from columns and diagonals (``block_lists.block_lists``)."""
    found: Callable[..., Tensor] = _of_device("block_lists", device)
    return found


@lru_cache(maxsize=4)
def line_cover(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The implementation of finding lines that cover attention (``line_cover.line_cover``)."""
    found: Callable[..., tuple[Tensor, Tensor]] = _of_device("line_cover", device)
    return found


def _of_device(name: str, device: str) -> Any:
    """A function without free choices: in C++ on the CPU, of stock operators elsewhere; its module has its name."""
    if device == "cpu":
        from .cpp.compile import missing_toolchain

        if missing_toolchain() is None:
            return getattr(import_module(f".cpp.{name}", __package__), name)
    return getattr(import_module(f".{name}", __package__), name)


def _generated(module: str, name: str, spec: Any, device: str, stock: Callable[..., Any]) -> Choice:
    """``name(spec)`` of the device's generated kernels; ``stock``, of the reference, where they do not support it."""
    generated, reason = _module(module, spec, device)
    if reason is None:
        return Choice(_GENERATORS[device], getattr(generated, name)(spec))
    return Choice("reference", stock, reason)


def _module(name: str, spec: Any, device: str) -> tuple[Any, str | None]:
    """The device's module of generated kernels, imported on first use, and why it does not support ``spec``."""
    folder = _GENERATORS.get(device)
    if folder is None:
        return None, f"no generated kernels for device {device}"
    module = import_module(f".{folder}.{name}", __package__)
    return module, module.supports(spec)


def picked(kernel: str, pick: str, device: str) -> Callable[..., Any]:
    """The callable of a ``Pick`` by its key: the candidate that was measured, or the seed."""
    found = Pick.from_key(kernel, pick)
    return realise(found.spec, found.candidate or candidates(found.spec, device)[0])


@lru_cache(maxsize=4096)
def attend(plan: str) -> Callable[..., Any]:
    """The callable of a decode ``Plan`` by its key: the pick for the number of tokens that are stored at the call."""
    spec = Plan.from_key(plan).spec
    picks = [(limit, _decode(spec, candidate)) for limit, candidate in Plan.from_key(plan).picks]
    if len(picks) == 1:
        return picks[0][1]

    def run(q: Tensor, k_new: Any, v_new: Any, k_buf: Tensor, v_buf: Tensor, lens: Tensor, *rest: Any) -> Any:
        tokens = int(lens[1])
        pick = next(pick for limit, pick in picks if limit is None or tokens <= limit)
        return pick(q, k_new, v_new, k_buf, v_buf, lens, *rest)

    return run


@lru_cache(maxsize=4096)
def attend_staged(plan: str) -> Callable[..., Any]:
    """For a decode ``Plan`` that reads lists: the callable for what was gathered by them (``staging.attend``)."""
    given = Plan.from_key(plan)
    spec, device = staged_spec(given.spec), "cuda" if given.picks[-1][1].implementation == "triton" else "cpu"
    return realise(spec, candidates(spec, device)[0])


def _decode(spec: AttentionSpec, candidate: Candidate) -> Callable[..., Any]:
    """A candidate as models call it: caches whose codebook is for rotated tokens hold such ones."""
    formats = spec.key_format, spec.value_format
    if all(fmt.codebook == "uniform" for fmt in formats):
        return realise(spec, candidate)
    # Tokens are turned behind the rotary embedding, so the kernel, which comes last, cannot do that as well.
    run = rotation.rotated(realise(replace(spec, rotary="none", rotary_dim=0), candidate), *formats)
    return run if spec.rotary == "none" else rotary.before(run, spec)


@lru_cache(maxsize=4096)
def attend_prompt(plan: str) -> Callable[..., Any]:
    """The callable of a prefill ``Plan`` by its key: the pick for the length of the prompt."""
    picks = [(limit, realise(Plan.from_key(plan).spec, candidate)) for limit, candidate in Plan.from_key(plan).picks]
    if len(picks) == 1:
        return picks[0][1]

    def run(q: Tensor, k: Tensor, *rest: Any) -> Any:
        pick = next(pick for limit, pick in picks if limit is None or k.shape[2] <= limit)
        return pick(q, k, *rest)

    return run


def realise(spec: Spec, candidate: Candidate) -> Callable[..., Any]:
    """The candidate's callable; where its compiler fails, that of stock operators, with a warning that says so."""
    try:
        return build(spec, candidate)
    except Exception as error:  # compilers raise what they like; the run must go on
        first = str(error).strip().splitlines()
        warnings.warn(
            f"{candidate.key()} could not be built ({type(error).__name__}: {first[0] if first else 'no message'}); "
            f"stock operators run {spec.key()} instead",
            stacklevel=2,
        )
        return build(spec, Candidate("composed"))


@lru_cache(maxsize=4)
def append_pages(device: str) -> Callable[..., None]:
    """The implementation of appending to the pages of a ragged cache (``ragged.append``)."""
    if device == "cpu":
        from .cpp.compile import missing_toolchain

        # At 16k tokens, of which 4 heads keep a quarter, attention takes 91 us with it, 108 us with stock operators;
        # with emptied caches, as a model's weights leave them, 0.23-0.31 ms and 0.40-0.45 ms (a busy core's minima).
        if missing_toolchain() is None:
            from .cpp.append_pages import append_pages as generated

            return generated
    from .ragged import append as stock

    return stock


@lru_cache(maxsize=4)
def merge(device: str) -> Callable[..., Tensor]:
    """The implementation of merging partial attention (``shared_prefix.merge``)."""
    if device == "cpu":
        from .cpp.compile import missing_toolchain

        if missing_toolchain() is None:
            from .cpp.merge import merge as generated

            return generated
    from .shared_prefix import merge as stock

    if device == "cuda":
        from .triton.merge import merge as combine

        return partial(stock, combine=combine)
    return stock
