"""Baselines: what a user may name, whether they compute the same, what their caches really take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchaccel.evaluation.allocated import tensor_bytes
from torchaccel.evaluation.baselines import hf_quantized
from torchaccel.evaluation.bench import Setup, run_bench
from torchaccel.evaluation.case import Case
from torchaccel.evaluation.decode import random_content
from torchaccel.evaluation.models import LoadedModel, model_facts
from torchaccel.evaluation.prefill import prefill
from torchaccel.evaluation.runners import BASELINES, parse_baselines, runner_of
from torchaccel.evaluation.variants import Variant

from .schema import check_document
from .tiny import save_tiny_model, tiny_model


def test_baselines_keep_their_order_and_lose_repetitions() -> None:
    assert [v.label for v in parse_baselines("inductor, eager,inductor")] == ["inductor", "eager"]
    assert parse_baselines("") == []


def test_arguments_become_options() -> None:
    found = parse_baselines("hf_quantized,hf_quantized:fp8,kvpress:snapkv,kvpress:tova:0.25")
    assert [v.kind for v in found] == ["hf_quantized", "hf_quantized", "kvpress", "kvpress"]
    assert [dict(v.options) for v in found] == [
        {"backend": "quanto"},
        {"backend": "fp8"},
        {"press": "snapkv"},
        {"press": "tova", "compression_ratio": 0.25},
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("jit", "unknown baseline 'jit' Known: eager, inductor, static, flex, hf_quantized, kvpress"),
        ("eagre", "unknown baseline 'eagre'; did you mean 'eager'?"),
        ("flex:1", "flex takes no argument"),
        ("hf_quantized:fp4", "unknown backend of hf_quantized 'fp4'; did you mean 'fp8'?"),
        ("hf_quantized:fp8:2", r"hf_quantized\[:backend\]"),
        ("kvpress", "kvpress:<press>"),
        ("kvpress:snapvk", "did you mean 'snapkv'?"),
        ("kvpress:snapkv:1.5", "from 0 to below 1"),
        ("kvpress:snapkv:half", "from 0 to below 1"),
    ],
)
def test_unusable_names_are_errors_that_name_the_nearest(names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_baselines(names)


def test_attention_has_baselines_of_its_own() -> None:
    assert [v.kind for v in parse_baselines("sdpa,flex", "attention")] == ["sdpa", "flex"]
    with pytest.raises(ValueError, match="unknown baseline 'eager' Known: sdpa, flex"):
        parse_baselines("eager", "attention")


@pytest.mark.parametrize("name", ["eager", "static", "hf_quantized:fp8"])
@torch.no_grad()
def test_prompts_and_steps_compute_the_same(name: str) -> None:
    """Uncompiled, since only the caches differ; 8-bit floats are close."""
    model = tiny_model()
    runner = runner_of(parse_baselines(name)[0], "prefill")
    built = runner.build(model, "prefill")
    tokens = torch.arange(40)[None] + 2
    expected = prefill(model, tokens)
    found = prefill(built, tokens, runner.new_cache(built, 48))
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    content = random_content(model_facts(LoadedModel("tiny", model, None)), 1, 40, torch.device("cpu"))
    cache = runner.filled_cache(built, content, 48)
    plain = runner_of(Variant("eager", "eager"), "decode").filled_cache(model, content, 48)
    step = tokens[:, :1]
    tolerance = 0.05 if "fp8" in name else 1e-5
    got, want = (m(step, past_key_values=c).logits for m, c in ((built, cache), (model, plain)))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    token = 2 * 2 * 16
    assert runner.kv_bytes(cache) == {"eager": 41 * token * 4, "static": 48 * token * 4}.get(name, 41 * token + 8)


def test_generation_uses_the_cache_of_the_baseline() -> None:
    model, prompt = tiny_model(), torch.arange(30)[None] + 2
    runner = runner_of(parse_baselines("hf_quantized:fp8")[0], "generate")
    found = runner.generate(runner.build(model, "generate"), prompt, 5)
    assert found.tokens.shape == (1, 5)
    assert found.kv_bytes == 2 * 2 * 16 * (30 + 4) + 8
    assert found.ms >= found.ttft_ms > 0
    assert model.generation_config.cache_implementation is None


def test_a_missing_package_is_a_reason_to_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_quantized, "find_spec", lambda module: None)
    case = Case("decode", context=32, rounds=1, warmup=0, fidelity=False)
    setup = Setup(str(save_tiny_model(tmp_path)), "cpu", cold=False, probe_megabytes=8, probe_gemm=128)
    document = run_bench(case, parse_baselines("hf_quantized,kvpress:snapkv,hf_quantized:fp8"), setup, [])
    check_document(document)
    quanto, kvpress, fp8 = document["results"]
    assert (quanto["status"], fp8["status"]) == ("absent", "ok")
    assert "pip install optimum-quanto" in quanto["reason"]
    assert kvpress["reason"] == "kvpress:snapkv does not apply to decode; it takes part in generate"


@pytest.mark.skipif(
    hf_quantized.HFQuantized({"backend": "quanto"}).absent() is not None, reason="optimum-quanto is not installed"
)
def test_codes_scales_and_recent_tokens_are_counted() -> None:
    model = tiny_model()
    runner = runner_of(parse_baselines("hf_quantized")[0], "generate")
    found = runner.generate(runner.build(model, "generate"), torch.arange(32)[None] + 2, 5)
    elements = 2 * 2 * 16 * 32
    # 4 bits each, a float32 scale and shift per 64, and four recent tokens in float32.
    assert found.kv_bytes == elements // 2 + elements // 64 * 8 + 4 * 2 * 2 * 16 * 4


def test_shared_storage_counts_once_and_weights_not_at_all() -> None:
    base = torch.zeros(100)
    held = {
        "a": base[:10],
        "b": [base[50:], (torch.zeros(5, dtype=torch.int8), "text")],
        "model": torch.nn.Linear(9, 9),
    }
    assert tensor_bytes(held) == 400 + 5
    assert tensor_bytes(None) == 0


def test_every_baseline_has_a_sentence() -> None:
    assert all(runner.__doc__ for runner in BASELINES.values())
