"""A whole model on devices that are not here: parts worked out by hand, methods, and what cannot be predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchaccel.passes.layer_skipping.unified import executed_layers
from transformers import LlamaConfig, MixtralConfig
from typer.testing import CliRunner

import torchaccel
from torchaccel.cost.calibration import Calibration, Coefficients
from torchaccel.cost.devices import device_facts
from torchaccel.cost.model import ModelSizes
from torchaccel.cost.predict import predict_model
from torchaccel.cost.traffic import Traffic
from torchaccel.options import resolve

# Llama 3.1 8B: 7.5 billion weights are read for a token, 8.03 billion are stored.
SIZES = ModelSizes("bfloat16", 32, 32, 8, 128, 218_103_808, 525_336_576, 16_060_522_496)
IDEAL = Calibration(
    {"cuda/cpp/linear/bfloat16": Coefficients(), "cuda/triton/decode_attention/bfloat16": Coefficients()}
)


def tiny(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": True}
    return LlamaConfig(**sizes | changes)


def test_a_device_that_is_not_present() -> None:
    found = predict_model(SIZES, {"batch": 1, "context": 131072}, {}, "h200", IDEAL)
    # 15 GB of weights at 4.8 TB/s; 32 times 112 us of attention, and its launches.
    assert found.exact.decode_weights_ms == pytest.approx(7_504_658_432 * 2 / 4.8e9)
    assert found.exact.decode_attention_ms == pytest.approx(32 * (0.112 + 2 * 0.003), rel=0.02)
    assert found.exact.kv_bytes == 131072 * 32 * 8 * 128 * 2 * 2
    assert found.asked == found.exact
    assert any("nothing was measured" in note for note in found.notes)


def test_parts_add_up() -> None:
    cost = predict_model(SIZES, 8192, {"kv_compression": {"method": "int8"}}, "mi300x").asked
    assert cost.decode_ms == pytest.approx(cost.decode_weights_ms + cost.decode_attention_ms + cost.decode_overhead_ms)
    prefill = cost.prefill_weights_ms + cost.prefill_attention_ms + cost.prefill_overhead_ms
    assert cost.prefill_ms == pytest.approx(prefill)


@pytest.mark.parametrize(
    ("options", "decode", "prefill", "kv"),
    [
        ({"kv_compression": {"method": "int8"}}, (0.4, 0.95), (1, 1), (0.5, 0.56)),
        ({"kv_compression": {"method": "int4"}}, (0.2, 0.9), (1, 1), (0.25, 0.32)),
        ({"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 1024}}, (0.1, 0.9), (0.1, 0.9), (1, 1)),
        ({"layer_skipping": {"method": "unified", "target_speedup": 2.0}}, (0.45, 0.55), (1, 1), (0.5, 0.5)),
        ({"token_pruning": {"method": "fastv", "keep": 0.5, "layer": 2}}, (0.3, 0.95), (0.3, 0.6), (0.5, 0.55)),
    ],
)
def test_every_method_helps_where_it_should(
    options: dict[str, Any], decode: tuple[float, float], prefill: tuple[float, float], kv: tuple[float, float]
) -> None:
    found = predict_model(SIZES, {"batch": 8, "context": 65536}, options, "h100")
    for name, (low, high) in (("decode_ms", decode), ("prefill_ms", prefill), ("kv_bytes", kv)):
        ratio = getattr(found.asked, name) / getattr(found.exact, name)
        assert low * 0.999 <= ratio <= high * 1.001, f"{name} of {options}: {ratio}"


LSERVE = {"method": "lserve", "retrieval_heads": {0: (0, 1)}}


def test_retrieving_reads_lists_and_what_they_are_chosen_by() -> None:
    """Bytes of the specification: of 32 layers 2 are dense; bounds of pages of 16 tokens are an eighth of the keys."""
    whole = predict_model(SIZES, {"batch": 8, "context": 65536}, {}, "h100").exact

    def ratios(family: str, **method: Any) -> tuple[float, float]:
        options = resolve({family: method}).requested()
        found = predict_model(SIZES, {"batch": 8, "context": 65536}, {family: options[family]}, "h100").asked
        return found.decode_attention_ms / whole.decode_attention_ms, found.kv_bytes / whole.kv_bytes

    time, size = ratios("sparse_attention", method="quest", tokens=4096)
    assert time == pytest.approx(2 / 32 + 30 / 32 / 8, rel=0.15) and size == pytest.approx(1 + 30 / 32 / 16, rel=1e-3)
    assert ratios("sparse_attention", method="quest", tokens=65536)[0] == pytest.approx(1)
    time, size = ratios("sparse_attention", method="double_sparsity", tokens=4096)
    assert time == pytest.approx(2 / 32 + 30 / 32 * 3 / 16, rel=0.15) and size == pytest.approx(
        1 + 30 / 32 / 8, rel=1e-3
    )
    time, size = ratios("sparse_attention", method="infllm_v2", window=1024, blocks=48)
    assert time == pytest.approx(1 / 16 + 1 / 32, rel=0.25) and size == pytest.approx(1 + 1 / 32, rel=1e-3)
    assert ratios("sparse_attention", method="infllm_v2", dense_len=65536)[0] == pytest.approx(1)
    time, size = ratios("sparse_attention", method="lserve", tokens=4096)
    assert time == pytest.approx(1 / 16 + 1 / 64, rel=0.25) and size == pytest.approx(1 + 1 / 16, rel=1e-3)
    time, size = ratios("sparse_attention", method="recycled_attention", tokens=4096, stride=8)
    assert time == pytest.approx(1 / 16 * 7 / 8 + 1 / 8, rel=0.15) and size == pytest.approx(1)
    time, size = ratios("sparse_attention", method="tidal_decode", tokens=4096)
    assert time == pytest.approx(4 / 32 + 28 / 32 / 16, rel=0.15) and size == pytest.approx(1)
    for unknown in ({"method": "recycled_attention", "schedule": "similarity"}, LSERVE):
        with pytest.raises(ValueError, match="reads what the options do not tell: their work is not modelled"):
            ratios("sparse_attention", **unknown)
    # Tokens that stay carry their column in 4 bytes, beside 512 of keys and values.
    column = 4 / 512
    time, size = ratios("kv_compression", method="mpcache", ratio=0.5, share=2, dense_layers=0)
    assert time == pytest.approx(0.5 * (0.2 + 3 / 64), rel=0.15)
    assert size == pytest.approx(0.5 * (1 + 3 / 64 + column), rel=1e-3)
    time, size = ratios("kv_compression", method="sentence_kv", tokens=2048, factor=4.0, window=32)
    stored = (4 * 2048 + 32) / 65536
    assert time == pytest.approx(2048 / 65536 + stored / 8, rel=0.25)
    assert size == pytest.approx(stored * (9 / 8 + column), rel=1e-3)


def test_it_says_when_nothing_fits() -> None:
    notes = predict_model(SIZES, {"batch": 8, "context": 131072}, {}, "rtx4090").notes
    assert any(note.startswith("does not fit: 153.5 GB of weights and cache, 24.0 GB of memory") for note in notes)


def test_a_configuration_is_enough_and_equals_its_model() -> None:
    config = tiny(dtype=torch.float32)
    sizes = ModelSizes.of(config)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    assert (sizes.layer_weights, sizes.other_weights) == (attention + 3 * 64 * 96, 256 * 64)
    assert (sizes.dtype, sizes.layers, sizes.kv_heads) == ("float32", 4, 2)
    from transformers import LlamaForCausalLM

    assert ModelSizes.of(LlamaForCausalLM(config)) == sizes


def test_the_public_function_takes_options_in_the_users_words() -> None:
    ids = torch.zeros(2, 4096, dtype=torch.int64)
    found = torchaccel.predict(tiny(), {"input_ids": ids}, {"kv_compression": "int8"}, device="h200")
    assert (found.batch, found.context) == (2, 4096)
    assert found.asked.kv_bytes < 0.7 * found.exact.kv_bytes
    assert json.loads(json.dumps(found.to_dict()))["device"]["name"] == "H200 SXM"


def test_facts_can_be_given() -> None:
    slow = replace(device_facts("h200"), dram_gbs=480.0)
    slow_ms, fast_ms = (predict_model(SIZES, 4096, {}, f).exact.decode_weights_ms for f in (slow, device_facts("h200")))
    assert slow_ms == pytest.approx(10 * fast_ms)


def test_what_is_not_modelled_is_refused() -> None:
    with pytest.raises(ValueError, match="sparse_attention: minference"):
        predict_model(SIZES, 10, {"sparse_attention": {"method": "minference"}}, "h200")
    with pytest.raises(ValueError, match="int8 on some of the layers"):
        predict_model(SIZES, 10, {"kv_compression": {"method": "int8", "layers": "0-3"}}, "h200")
    with pytest.raises(ValueError, match="unknown device 'h2000'; the nearest is 'h200'"):
        torchaccel.predict(tiny(), 10, device="h2000")
    with pytest.raises(ValueError, match="inputs are token ids"):
        predict_model(SIZES, "a prompt", {}, "h200")
    with pytest.raises(ValueError, match="mixture of experts"):
        ModelSizes.of(MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64))
    with pytest.raises(ValueError, match="found Linear"):
        ModelSizes.of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="found int"):
        ModelSizes.of(3)


@pytest.mark.parametrize("layers", [2, 7, 12, 32, 80])
@pytest.mark.parametrize("speedup", [1.0, 1.3, 2.0, 3.5])
def test_skipping_runs_as_many_layers_as_the_pass(layers: int, speedup: float) -> None:
    traffic = Traffic({"layer_skipping": {"method": "unified", "target_speedup": speedup}})
    if int(layers / speedup) >= 2:
        assert traffic.decode_layers(layers) == len(executed_layers(layers, speedup))


def test_the_command_prints_one_document() -> None:
    from typer import Typer

    from torchaccel.cli.predict import predict

    app = Typer()
    app.command()(predict)
    asked = ["--model", "demo", "--context", "2048", "--options", '{"kv_compression": "int8"}', "--device", "l40s"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "KV cache, MB" in done.output and "L40S" in done.output
    wrong = CliRunner().invoke(app, [*asked, "--device", "abacus"])
    assert wrong.exit_code == 2
