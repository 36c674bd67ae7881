"""Floors against bytes and FLOPs counted by hand."""

from __future__ import annotations

import pytest

from torchaccel.cost.traffic import Traffic
from torchaccel.evaluation.machine import Machine
from torchaccel.evaluation.models import LoadedModel, load_model, model_facts
from torchaccel.evaluation.roofline import Work, decode_floor, density, prefill_floor
from torchaccel.evaluation.variants import requested

from .tiny import tiny_model

MACHINE = Machine("paper", 2, read_gbs=1.0, copy_gbs=1.0, gemm_gflops={"float32": 1e6, "bfloat16": 1e6})
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64
LAYER = ATTENTION + 3 * 64 * 96
HEAD = 2048 * 64
STREAMING = {"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 12}}


@pytest.fixture(scope="module")
def work() -> Work:
    model = tiny_model()
    found = Work.of(model, model_facts(LoadedModel("tiny", model, None)))
    assert found is not None
    return found


def test_weights_are_counted_once_and_a_tied_embedding_is_the_head(work: Work) -> None:
    assert (work.layer_weights, work.other_weights) == (LAYER, HEAD)


def test_decode_reads_weights_and_cache(work: Work) -> None:
    kv = 2 * 2 * 100 * 16 * 4
    floor = decode_floor(work, {}, MACHINE, batch=1, context=99)
    assert floor == pytest.approx(((LAYER + HEAD) * 4 + kv) / 1e6)


def test_streaming_reads_sinks_and_window_only(work: Work) -> None:
    kv = 2 * 2 * 16 * 16 * 4
    floor = decode_floor(work, requested(STREAMING), MACHINE, batch=1, context=99)
    assert floor == pytest.approx(((LAYER + HEAD) * 4 + kv) / 1e6)


def test_int8_reads_a_byte_per_value_and_its_scales(work: Work) -> None:
    # A block of 64 tokens: keys have 16 groups of 4 bytes, values 64.
    kv = 100 / 64 * 2 * ((64 * 16 + 4 * 16) + (64 * 16 + 4 * 64))
    floor = decode_floor(work, requested({"kv_compression": "int8"}), MACHINE, batch=1, context=99)
    assert floor == pytest.approx(((LAYER + HEAD) * 4 + kv) / 1e6)


def test_prefill_counts_gemms_and_visible_pairs(work: Work) -> None:
    slow = Machine("paper", 2, 1e9, 1e9, {"float32": 1.0})
    flops = 2 * HEAD + 2 * 32 * LAYER + 4 * 4 * 16 * (32 * 33 // 2)
    assert prefill_floor(work, {}, slow, batch=1, context=32) == pytest.approx(flops / 1e6)


def test_visible_pairs_equal_a_mask() -> None:
    options = requested(STREAMING)
    counted = sum(1 for t in range(40) for c in range(t + 1) if c > t - 12 or c < 4)
    assert Traffic(options).visible_pairs(40) == counted
    assert density(40, options, decode=False) == pytest.approx(counted / 820)
    assert density(39, options, decode=True) == pytest.approx(16 / 40)
    assert density(39, {}, decode=True) is None


def test_an_unknown_method_has_no_floor(work: Work) -> None:
    options = {"kv_compression": {"method": "something_new"}}
    assert decode_floor(work, options, MACHINE, batch=1, context=99) is None


def test_facts_of_the_benchmark_model() -> None:
    facts = model_facts(load_model("llama-110m"))
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim, facts.dtype) == (12, 12, 4, 64, "bfloat16")
    assert facts.weight_bytes == 2 * facts.params
