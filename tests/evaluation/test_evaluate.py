"""Whole evaluations on tiny models: the document, resuming, single layers, encoders, and bad requests."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import torchaccel
from torchaccel.evaluation import evaluate as evaluation
from torchaccel.evaluation.digests import weights_digest
from torchaccel.evaluation.evaluate import run_evaluate
from torchaccel.evaluation.evaluation import evaluation_variants, open_evaluation
from torchaccel.evaluation.machine import Machine
from torchaccel.evaluation.models import LoadedModel, load_tokenizer
from torchaccel.evaluation.prompts import excerpt
from torchaccel.evaluation.tasks import likelihood, sensitivity
from torchaccel.evaluation.tasks.continuation import TIMED_CALLS
from torchaccel.evaluation.tasks.run import EvaluateCase

from .schema import check_document
from .tiny import DEMO_MODEL, tiny_model

MACHINE = Machine("paper", 2, read_gbs=1.0, copy_gbs=1.0, gemm_gflops={"float32": 1.0})
CASE = EvaluateCase(
    tasks=("perplexity", "agreement", "recall", "sensitivity"),
    window=96,
    prompt=64,
    windows=3,
    batch=2,
    new_tokens=4,
    lengths=(128,),
    questions=2,
)
OPTIONS = [{}, {"kv_compression": "int8"}]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel("tiny", tiny_model(), load_tokenizer(DEMO_MODEL))


def run(
    loaded: LoadedModel,
    case: EvaluateCase,
    options: list[dict[str, Any]],
    journal: Path | None = None,
    save: Callable[[Any], None] = lambda document: None,
) -> Any:
    session = open_evaluation(loaded, case, MACHINE)
    session.probe_megabytes = 8
    found = run_evaluate(case, [excerpt()], evaluation_variants(options), session, ["test"], journal, save)
    check_document(found)
    json.dumps(found, allow_nan=False)
    return {result["variant"]: result for result in found["results"]}


def test_an_evaluation_from_end_to_end_and_resumed(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "measure_retrieval", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(loaded, CASE, OPTIONS, journal)
    finished = len(journal.read_text().splitlines())
    assert finished == 3 * (2 + 1), "two batches of text and the continuations, for each of three variants"
    scored: list[int] = []
    with monkeypatch.context() as patched:
        for module in (likelihood, sensitivity):
            patched.setattr(module, "reference_logits", lambda *a: scored.append(1) or reference(*a))
        found = run(loaded, CASE, OPTIONS, journal)
    assert len(scored) == 1, "only the sensitivity was left to be scored"
    assert not journal.exists()

    assert [result["status"] for result in found.values()] == ["ok"] * 3, found
    eager, exact, int8 = found.values()
    assert exact["fidelity"]["max_abs_err_vs_fp32"] < 1e-4 < int8["fidelity"]["max_abs_err_vs_fp32"]
    assert exact["fidelity"]["perplexity"] == pytest.approx(eager["fidelity"]["perplexity"], rel=1e-5)
    assert exact["fidelity"]["eager_max_abs_err_vs_fp32"] == eager["fidelity"]["max_abs_err_vs_fp32"]
    assert exact["fidelity"]["greedy_prefix"] == CASE.new_tokens
    assert exact["tpot_ms"]["n"] == TIMED_CALLS
    assert set(exact["speedup"]) == {"eager", "torchaccel:int8"}
    assert int8["kv_bytes"] < exact["kv_bytes"]
    details = int8["details"]
    assert [bucket["from"] for bucket in details["perplexity"]["buckets"]] == [64, 72, 80, 88]
    assert details["perplexity"]["windows"] == 3 and details["perplexity"]["tokens"] == 3 * 32
    assert details["agreement"]["greedy_prefix"]["prompts"] == 3
    assert details["recall"]["one_fact"]["lengths"] == [128]
    assert len(details["recall"]["one_fact"]["scores"][0]) == 5
    # The model has one layer: treating it alone is treating all, over the first batch of windows.
    assert details["sensitivity"]["layers"][0]["kl"] == pytest.approx(int8["fidelity"]["kl"], rel=0.5)
    assert exact["details"]["sensitivity"] is None


reference = likelihood.reference_logits


def interrupt(*_args: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_has_nothing_left_to_do_tells_what_took_effect(loaded: LoadedModel, tmp_path: Path) -> None:
    case, journal = replace(CASE, tasks=("perplexity",), windows=2), tmp_path / "journal"
    options = [{"kv_compression": "int8"}]

    def full(_document: Any) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match=r"no space left"):
        run(loaded, case, options, journal, full)
    assert len(journal.read_text().splitlines()) == 2, "what could not be saved is not thrown away"
    torch._dynamo.reset()
    found = run(loaded, case, options, journal)["torchaccel:int8"]
    assert found["status"] == "ok", found["reason"]
    assert set(found["effective"]) == {"int8"}
    assert not journal.exists()


def test_pieces_of_another_checkpoint_do_not_count(loaded: LoadedModel) -> None:
    other = copy.deepcopy(loaded.model)
    assert weights_digest(other) == weights_digest(loaded.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.001)
    assert weights_digest(other) != weights_digest(loaded.model)


def test_a_method_without_single_layers_says_so(loaded: LoadedModel) -> None:
    case = EvaluateCase(tasks=("sensitivity",), window=48, prompt=32, windows=1, batch=1)
    found = run(loaded, case, [{"token_pruning": {"method": "fastv", "layer": 1}}])
    found = found["torchaccel:fastv"]["details"]["sensitivity"]
    assert found["layers"] == []
    assert "treats no single layers" in found["reason"] and "int8" in found["reason"]


def test_the_python_api(loaded: LoadedModel) -> None:
    found = torchaccel.evaluate(
        loaded.model, [excerpt()], tokenizer=loaded.tokenizer, tasks=("perplexity",), window=48, prompt=32, windows=2
    )
    assert list(found.results) == ["eager", "torchaccel:exact"]
    assert "perplexity" in str(found) and "torchaccel" in str(found)
    assert found.results["torchaccel:exact"]["fidelity"]["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)


def test_encoders_are_compared_by_their_embeddings() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    config.architectures = ["BertModel"]
    encoder = LoadedModel("encoder", BertModel(config).eval(), load_tokenizer(DEMO_MODEL))
    found = run(encoder, EvaluateCase(), [{}])
    similarity = found["torchaccel:exact"]["details"]["similarity"]
    assert similarity["kind"] == "embedding"
    assert 0.9999 < similarity["min"] <= similarity["mean"] <= 1.0001
    assert found["torchaccel:exact"]["fidelity"]["max_abs_err_vs_fp32"] < 1e-4


def test_what_cannot_be_evaluated_is_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'recal'; the tasks are perplexity, agreement"):
        EvaluateCase(tasks=("recal",))
    with pytest.raises(ValueError, match=r"prompt of 64 tokens must be shorter than the window of 64"):
        EvaluateCase(window=64, prompt=64)
    with pytest.raises(ValueError, match=r"longest text has \d+ tokens and a window 96"):
        session = open_evaluation(loaded, CASE, MACHINE)
        run_evaluate(CASE, ["Too short."], evaluation_variants([]), session)
    with pytest.raises(ValueError, match=r"a question of eight_facts needs \d+ tokens and 64 were allowed"):
        session = open_evaluation(loaded, CASE, MACHINE)
        run_evaluate(replace(CASE, lengths=(512, 64)), [excerpt()], evaluation_variants([]), session)
    with pytest.raises(ValueError, match=r"'similarity' is not for a language model, whose tasks are perplexity"):
        run(loaded, EvaluateCase(tasks=("similarity",)), [{}])
    with pytest.raises(ValueError, match=r"'recall' is not for an encoder, whose tasks are similarity"):
        EvaluateCase(tasks=("recall",)).for_model(encoder=True)
    with pytest.raises(ValueError, match=r"there is no folder"):
        run(loaded, CASE, [{}], Path("no-such-folder/journal"))
    with pytest.raises(ValueError, match=r"no tokenizer"):
        session = open_evaluation(LoadedModel("bare", loaded.model, None), CASE, MACHINE)
        run_evaluate(CASE, ["x"], evaluation_variants([]), session)
