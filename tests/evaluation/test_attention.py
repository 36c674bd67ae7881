"""The attention benchmark: problems, operators, and which kernel the compiler chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchaccel.cost.probe import cache_bytes
from torchaccel.evaluation.attention import run_attention
from torchaccel.evaluation.bench import default_variants, session_document
from torchaccel.evaluation.case import Case
from torchaccel.evaluation.machine import Machine
from torchaccel.evaluation.models import LoadedModel, model_facts
from torchaccel.evaluation.operators import problem as problems
from torchaccel.evaluation.operators.capture import capture
from torchaccel.evaluation.operators.flex import FlexOperator
from torchaccel.evaluation.operators.kernel import Kernel
from torchaccel.evaluation.operators.problem import Problem
from torchaccel.evaluation.operators.sdpa import Sdpa
from torchaccel.evaluation.roofline import attention_floor
from torchaccel.evaluation.runners import parse_baselines
from torchaccel.evaluation.session import Session
from torchaccel.evaluation.variants import Variant, requested

from .schema import check_document
from .tiny import tiny_model

CPU = torch.device("cpu")
MACHINE = Machine("paper", 2, read_gbs=1.0, copy_gbs=1.0, gemm_gflops={"float32": 1e6})
WINDOW = {"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 12}}
INT8 = {"kv_compression": "int8"}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four copies of a problem, not thousands: the contents here are tiny."""
    monkeypatch.setattr(problems, "cache_bytes", lambda device: 2 * 2 * 101 * 16 * 4)


def problem(phase: str) -> Problem:
    model = tiny_model()
    return Problem.draw(model, model_facts(LoadedModel("tiny", model, None)), phase, 1, 100)


def test_the_copies_leave_nothing_in_the_caches() -> None:
    assert len(problem("decode").contents) == problems.COLD
    assert len(problem("prefill").contents) == problems.COLD + 1
    assert cache_bytes(CPU) >= 2**18


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("options", [{}, INT8, WINDOW], ids=str)
def test_kernels_compute_what_their_spec_says(phase: str, options: dict[str, Any]) -> None:
    given = problem(phase)
    truth = given.truth()
    kernel = Kernel(options)
    operator = kernel.build(given, "attention")
    errors = [given.error(operator(), truth) for _ in range(len(given.contents) + 1)]
    assert errors[0] == errors[-1], "the turn begins anew, and a call leaves the cache as it found it"
    assert min(errors[1:-1]) > 0.1, "other contents"
    stock = given.error(Sdpa({}).build(given, "attention")(), truth)
    assert stock < 1e-6
    if options == WINDOW:
        assert errors[0] > 0.1
    elif options == INT8 and phase == "decode":
        assert 1e-6 < errors[0] < 0.05
    else:
        assert errors[0] < 1e-6


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_flex_is_exact(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    given = problem(phase)
    assert given.error(FlexOperator({}).build(given, "attention")(), given.truth()) < 1e-6


def test_the_spec_is_the_compilers() -> None:
    model = tiny_model()
    spec = capture(model, INT8 | WINDOW, "decode").spec
    assert spec is not None
    assert (spec.group, spec.head_dim, spec.window, spec.sinks, spec.mask) == (2, 16, 12, 4, "none")
    assert (spec.key_format.kind, spec.key_format.axis, spec.value_format.axis) == ("int8", "channel", "token")
    prompt = capture(model, INT8 | WINDOW, "prefill").spec
    assert prompt is not None
    assert (prompt.phase, prompt.causal, prompt.window, prompt.key_format.kind) == ("prefill", True, 12, "dense")


def test_a_whole_run() -> None:
    model = tiny_model()
    case = Case("attention", 100, rounds=2, warmup=0, phase="decode")
    loaded = LoadedModel("tiny", model, None)
    session = Session(loaded, MACHINE, case, CPU, caches="warm", probe_megabytes=1)
    pruned = Variant("torchaccel:fastv", "torchaccel", {"token_pruning": "fastv"})
    variants = [*parse_baselines("sdpa", "attention"), *default_variants(case, [WINDOW]), pruned]
    document = session_document(session, run_attention(session, variants), [])
    check_document(document)
    assert document["case"]["phase"] == "decode"
    found = {result["variant"]: result for result in document["results"]}
    sdpa, exact, int8 = (found[name] for name in ("sdpa", "torchaccel:exact", "torchaccel:int8"))
    assert sdpa["status"] == exact["status"] == int8["status"] == "ok", found
    assert sdpa["kv_bytes"] == exact["kv_bytes"] == 2 * 2 * 101 * 16 * 4
    # Two heads: tails of 64 tokens in full precision, two blocks of codes with scales per channel and per token.
    assert int8["kv_bytes"] == 2 * (2 * 64 * 16 * 4 + 2 * (64 * 16 + 4 * 16) + 2 * (64 * 16 + 4 * 64))
    assert exact["ms"]["n"] == 2 and exact["bound_ms"] > 0 and set(exact["speedup"]) >= {"sdpa"}
    assert exact["fidelity"]["eager_max_abs_err_vs_fp32"] == sdpa["fidelity"]["max_abs_err_vs_fp32"]
    assert found["torchaccel:streaming_llm#2"]["density"] == pytest.approx(16 / 101)
    assert found["torchaccel:fastv"]["status"] == "declined"
    assert "does not change the operator" in found["torchaccel:fastv"]["reason"]
    assert exact["predicted_ms"] is exact["details"] is exact["graphs"] is None


def test_floors_count_what_the_operator_touches() -> None:
    facts = model_facts(LoadedModel("tiny", tiny_model(), None))

    def floor(options: dict[str, Any], decode: bool, machine: Machine = MACHINE) -> float | None:
        return attention_floor(facts, requested(options), machine, batch=3, context=99, decode=decode)

    assert floor({}, True) == pytest.approx(3 * 2 * 2 * 100 * 16 * 4 / 1e6)
    assert floor(WINDOW, True) == pytest.approx(3 * 2 * 2 * 16 * 16 * 4 / 1e6)
    assert floor({}, False) == pytest.approx(3 * 2 * (4 + 2) * 99 * 16 * 4 / 1e6)
    slow = Machine("paper", 2, 1e9, 1e9, {"float32": 1.0})
    assert floor({}, False, slow) == pytest.approx(3 * 4 * 4 * 16 * (99 * 100 // 2) / 1e6)
