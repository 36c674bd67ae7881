"""Which implementation runs a spec on a device: generated C++, generated Triton, stock operators, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

from . import composed, kv_format, reference, selection_reference
from .selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from .spec import AttentionSpec, KVFormat, LinearSpec

# Above this many new tokens dense GEMM kernels beat one-row kernels, which read the cache once per row.
MAX_KERNEL_ROWS = 8


@dataclass(frozen=True)
class Choice:
    """An implementation, its name ("cpp", "triton", "composed", "reference"), and why a generated one was not taken."""

    name: str
    run: Callable[..., Any]
    reason: str | None = None


@lru_cache(maxsize=4096)
def decode_attention(spec: AttentionSpec, device: str) -> Choice:
    """The implementation of append-and-attend for up to ``MAX_KERNEL_ROWS`` new tokens."""
    module = _attention_module(device, "decode")
    reason = module.supports(spec) if module else f"no generated kernels for device {device}"
    if reason is None:
        return Choice(_name(device), module.decode_attention(spec))
    return Choice("composed", partial(composed.decode_attention, spec), reason)


@lru_cache(maxsize=4096)
def prefill_attention(spec: AttentionSpec, device: str) -> Choice:
    """The implementation of attention of a prompt over itself."""
    module = _attention_module(device, "prefill")
    reason = module.supports(spec) if module else f"no generated kernels for device {device}"
    if reason is None:
        return Choice(_name(device), module.prefill_attention(spec))
    return Choice("composed", partial(composed.prefill_attention, spec), reason)


@lru_cache(maxsize=256)
def linear(spec: LinearSpec, device: str) -> Choice:
    """The implementation of a few-row linear layer."""
    if device == "cpu":
        from .cpp import linear as module

        reason = module.supports(spec)
        if reason is None:
            return Choice("cpp", module.linear(spec))
    else:
        reason = f"no generated kernels for device {device}"
    return Choice("reference", reference.linear, reason)


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
    return _selection(spec, device, "summary", "summarise")


@lru_cache(maxsize=1024)
def select(spec: SelectionSpec, device: str) -> Choice:
    """The implementation of choosing what a decode step reads."""
    return _selection(spec, device, "selection", "select")


@lru_cache(maxsize=1024)
def select_prompt(spec: PromptSelectionSpec, device: str) -> Choice:
    """The implementation of choosing what every block of a prompt reads."""
    return _selection(spec, device, "prompt_selection", "select_prompt")


def _selection(spec: SummarySpec | SelectionSpec | PromptSelectionSpec, device: str, module: str, name: str) -> Choice:
    reason: str | None = f"no generated kernels for device {device}"
    if device == "cpu":
        generated = import_module(f".cpp.{module}", __package__)
        reason = generated.supports(spec)
        if reason is None:
            return Choice("cpp", getattr(generated, name)(spec))
    return Choice("reference", partial(getattr(selection_reference, name), spec), reason)


def attend(spec: AttentionSpec, device: str, rows: int) -> Callable[..., Any]:
    """The callable for ``rows`` new tokens: generated kernels for few, stock operators for many."""
    if rows > MAX_KERNEL_ROWS:
        return partial(composed.decode_attention, spec)
    return decode_attention(spec, device).run


def _name(device: str) -> str:
    return "cpp" if device == "cpu" else "triton"


def _attention_module(device: str, phase: str) -> Any:
    # Imported on first use: a machine without a GPU never loads Triton, one without g++ never looks for it.
    names = {
        ("cpu", "decode"): ".cpp.attention",
        ("cpu", "prefill"): ".cpp.window_prefill",
        ("cuda", "decode"): ".triton.decode_attention",
        ("cuda", "prefill"): ".triton.window_prefill",
    }
    name = names.get((device, phase))
    return None if name is None else import_module(name, __package__)
