"""The benchmarks behind ``torchaccel bench``: one case in, one results document out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import run_attention
from .decode import run_decode
from .generation import run_generate
from .machine import measure_machine, versions
from .models import is_encoder, load_model
from .prefill import run_prefill
from .prompts import prompt_tokens
from .recall import TASKS, make_question
from .results import Result, document
from .session import Case, Progress, Session, Silent, fresh_compilers
from .timing import LoadWatch, require_quiet
from .variants import Variant, torchaccel_variants

KINDS = ("decode", "prefill", "generate", "attention")
STREAMING = {"sparse_attention": "streaming_llm"}
INT8 = {"kv_compression": "int8"}


@dataclass(frozen=True)
class Setup:
    """Where a benchmark runs: model name or folder, device, dtype name ("auto": as saved), cold compile caches or not.

    ``probe_megabytes`` and ``probe_gemm`` are the sizes of the machine's measurement; ``require_quiet`` refuses a
    machine that others use.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    cold: bool = True
    probe_megabytes: int = 512
    probe_gemm: int = 2048
    require_quiet: bool = False


def default_variants(case: Case, extra: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """torchaccel exact, int8 where a cache is read, a window for attention alone, and one for each of ``extra``."""
    standard: list[Mapping[str, Any]] = [{}]
    if "prefill" not in (case.kind, case.phase):
        standard.append(INT8)
    if case.kind == "attention":
        standard.append(STREAMING)
    return torchaccel_variants([*standard, *extra])


def run_bench(
    case: Case,
    variants: Sequence[Variant],
    setup: Setup,
    command: Sequence[str],
    progress: Progress | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run ``case`` for all ``variants`` in one process and return the results document.

    ``save`` is called with a valid document of what is finished, at the beginning and after each variant. Raises
    ``ValueError`` for an unknown kind, model, device or dtype and ``RuntimeError`` for a busy machine that was required
    to be quiet; what goes wrong within a variant is recorded in its result instead.
    """
    if case.kind not in KINDS:
        raise ValueError(f"unknown benchmark {case.kind!r}; the benchmarks are {', '.join(KINDS)}")
    if setup.require_quiet:
        require_quiet()
    session = open_session(case, setup, progress)
    if save is not None:
        session.on_result = _saving(session, command, save)
        session.on_result([])
    with fresh_compilers(cold=setup.cold):
        if case.kind == "decode":
            results = run_decode(session, variants)
        elif case.kind == "prefill":
            results = run_prefill(session, variants)
        elif case.kind == "attention":
            results = run_attention(session, variants)
        else:
            results = run_generate(session, variants, generation_prompt(session)).results
    return session_document(session, results, command)


def _saving(
    session: Session, command: Sequence[str], save: Callable[[dict[str, Any]], None]
) -> Callable[[Sequence[Result]], None]:
    return lambda results: save(session_document(session, results, command))


def open_session(case: Case, setup: Setup, progress: Progress | None = None) -> Session:
    """Load the model and measure the machine."""
    watch = LoadWatch()
    device = resolve_device(setup.device)
    loaded = load_model(setup.model, dtype=resolve_dtype(setup.dtype), device=str(device))
    if is_encoder(loaded.model):
        raise ValueError(f"model {setup.model!r} is an encoder and generates nothing to time; use torchaccel evaluate")
    machine = measure_machine(device, megabytes=setup.probe_megabytes, gemm_size=setup.probe_gemm)
    caches = "cold" if setup.cold else "warm"
    return Session(loaded, machine, case, device, caches, setup.probe_megabytes, progress or Silent(), watch)


def session_document(session: Session, results: Sequence[Result], command: Sequence[str]) -> dict[str, Any]:
    """The results document of a finished session."""
    return document(
        command=list(command),
        versions=versions(),
        machine=session.machine.to_dict() | session.watch.result(),
        model=session.facts.to_dict(),
        case=session.case.to_dict(),
        results=results,
    )


def generation_prompt(session: Session) -> Tensor:
    """What ``generate`` is given: a recall question of eight facts for the demo model, else text or random tokens."""
    case, loaded = session.case, session.loaded
    if loaded.name != "demo":
        return prompt_tokens(loaded, case.batch, case.context, session.device)
    question = make_question(loaded.tokenizer, TASKS[1], case.context, random.Random(0))
    return torch.tensor([question.tokens] * case.batch, device=session.device)


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch sees no CUDA device; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; the devices are auto, cpu and cuda")
    return torch.device(name)


def resolve_dtype(name: str) -> torch.dtype | None:
    """The dtype called ``name``; None for "auto"."""
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"unknown dtype {name!r}; the dtypes are {', '.join(known)}")
    return known[name]
