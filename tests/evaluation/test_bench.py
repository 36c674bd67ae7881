"""Whole benchmark runs on a tiny model: the document, what it says, and how it reports trouble."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchaccel.evaluation.baselines.hf_quantized import HFQuantized
from torchaccel.evaluation.baselines.static import Static
from torchaccel.evaluation.bench import Setup, run_bench
from torchaccel.evaluation.case import Case
from torchaccel.evaluation.compiled import Compiled
from torchaccel.evaluation.decode import TURN
from torchaccel.evaluation.results import exit_code, write_document
from torchaccel.evaluation.runners import parse_baselines
from torchaccel.evaluation.variants import Variant, torchaccel_variants

from .schema import check_document
from .tiny import save_tiny_model

STREAMING = {"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 16}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(folder: Path, case: Case, variants: list[Variant]) -> dict[str, dict[str, Any]]:
    setup = Setup(str(folder), "cpu", cold=False, probe_megabytes=8, probe_gemm=128)
    found = run_bench(case, variants, setup, ["torchaccel", "bench", case.kind])
    check_document(found)
    json.dumps(found, allow_nan=False)
    return {result["variant"]: result for result in found["results"]}


def test_decode(folder: Path) -> None:
    variants = [*parse_baselines("eager"), *torchaccel_variants([{}, {"kv_compression": "int8"}])]
    found = run(folder, Case("decode", context=200, rounds=5, warmup=1), variants)
    assert [result["status"] for result in found.values()] == ["ok", "ok", "ok"], found
    exact, int8 = found["torchaccel:exact"], found["torchaccel:int8"]
    assert exact["ms"]["n"] == 5
    assert set(exact["speedup"]) == {"eager", "torchaccel:int8"}
    # float32 against float32: nothing but rounding.
    assert exact["fidelity"]["max_abs_err_vs_fp32"] < 1e-4
    assert int8["fidelity"]["max_abs_err_vs_fp32"] > exact["fidelity"]["max_abs_err_vs_fp32"]
    assert int8["kv_bytes"] < exact["kv_bytes"]
    # One graph adopts the plain cache, one serves every step after it.
    assert exact["graphs"] == 2
    assert exact["compile_s"]["warm"] > 0
    assert exact["compile_s"]["cold"] is None
    assert found["eager"]["graphs"] is None
    assert found["eager"]["kv_bytes"] == 2 * 2 * 16 * 4 * (200 + 2 + 1 + 5 * TURN + 2)
    assert exact["bound_ms"] > 0


def test_prefill(folder: Path) -> None:
    variants = [*parse_baselines("eager"), *torchaccel_variants([STREAMING])]
    found = run(folder, Case("prefill", context=128, rounds=2, warmup=1), variants)
    sparse = found["torchaccel:streaming_llm"]
    assert sparse["status"] == "ok", sparse
    assert 0 < sparse["density"] < 0.5
    assert found["eager"]["density"] is None
    assert found["eager"]["fidelity"]["max_abs_err_vs_fp32"] < 1e-4


def test_generate(folder: Path) -> None:
    variants = [*parse_baselines("eager"), *torchaccel_variants([{}])]
    case = Case("generate", context=64, new_tokens=8, rounds=2, warmup=0, recall_questions=0)
    found = run(folder, case, variants)
    exact = found["torchaccel:exact"]
    assert exact["status"] == "ok", exact
    assert exact["ms"] is None
    assert exact["ttft_ms"]["n"] == exact["tpot_ms"]["n"] == 2
    assert exact["fidelity"]["greedy_prefix"] == 8
    assert (exact["graphs"], exact["recompiles"]) == (2, 0)


def test_a_failed_variant_has_its_reason_and_the_others_their_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Compiled, model: Any, case: str) -> Any:
        raise RuntimeError("no compiler found\nmore lines")

    monkeypatch.setattr(Compiled, "build", broken)
    variants = [*parse_baselines("eager"), *torchaccel_variants([{}])]
    found = run(folder, Case("decode", context=32, rounds=2, warmup=0, fidelity=False), variants)
    assert found["eager"]["status"] == "ok"
    failed = found["torchaccel:exact"]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no compiler found")
    assert failed["ms"] is None
    assert exit_code(found.values()) == 1


def test_a_cold_run_tells_cold_and_warm_compile_time(folder: Path) -> None:
    setup = Setup(str(folder), "cpu", cold=True, probe_megabytes=8, probe_gemm=128)
    case = Case("decode", context=64, rounds=1, warmup=1, fidelity=False)
    (static,) = run_bench(case, parse_baselines("static"), setup, [])["results"]
    assert (static["status"], static["graphs"], static["recompiles"]) == ("ok", 1, 0), static
    assert static["compile_s"]["cold"] > static["compile_s"]["warm"] > 0
    assert static["kv_bytes"] == 2 * 2 * 16 * 4 * (64 + 2 + 1 + TURN + 2)


def test_an_interrupted_run_leaves_a_document_of_what_was_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: HFQuantized, model: Any, content: Any, capacity: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Static, "absent", lambda self: "there is none")
    monkeypatch.setattr(HFQuantized, "filled_cache", interrupted)
    path = tmp_path / "found.json"
    setup = Setup(str(folder), "cpu", cold=False, probe_megabytes=8, probe_gemm=128)
    case = Case("decode", context=32, rounds=1, warmup=0, fidelity=False)
    variants = parse_baselines("static,eager,hf_quantized:fp8")
    with pytest.raises(KeyboardInterrupt):
        run_bench(case, variants, setup, [], save=partial(write_document, path=path))
    document = json.loads(path.read_text())
    check_document(document)
    assert [result["variant"] for result in document["results"]] == ["static"]
    assert [child.name for child in tmp_path.iterdir()] == ["found.json"]


def test_a_busy_machine_is_refused_before_anything_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.5])
    monkeypatch.setattr("torchaccel.evaluation.timing._machine_cpu_seconds", lambda: next(ticks))
    setup = Setup("no-such-model", require_quiet=True)
    with pytest.raises(RuntimeError, match=r"other processes keep 1\.\d+ cores busy where 0.25 are tolerated"):
        run_bench(Case("decode", 8), [], setup, [])


def test_a_failed_baseline_is_not_our_failure() -> None:
    assert (
        exit_code([{"variant": "inductor", "status": "failed"}, {"variant": "torchaccel:exact", "status": "ok"}]) == 0
    )


@pytest.mark.parametrize(("field", "value"), [("device", "tpu"), ("dtype", "int3"), ("model", "gpt-9")])
def test_unusable_settings_are_errors_that_name_them(folder: Path, field: str, value: str) -> None:
    setup = Setup(**{"model": str(folder), field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=value):
        run_bench(Case("decode", 8), [], setup, [])
