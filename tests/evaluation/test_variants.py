"""Baselines and torchaccel variants from what a user types."""

from __future__ import annotations

import pytest

from torchaccel.errors import OptionsError
from torchaccel.evaluation.bench import default_variants
from torchaccel.evaluation.variants import parse_baselines, parse_options, torchaccel_variants


def test_baselines_keep_their_order_and_lose_repetitions() -> None:
    assert [v.label for v in parse_baselines("inductor, eager,inductor")] == ["inductor", "eager"]
    assert parse_baselines("") == []


def test_an_unknown_baseline_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown baseline 'jit'; the baselines are eager, inductor, static"):
        parse_baselines("eager,jit")


@pytest.mark.parametrize("text", ["int8", "[1]", "{"])
def test_options_must_be_a_json_object(text: str) -> None:
    with pytest.raises(ValueError, match="--options"):
        parse_options(text)


def test_labels_name_the_methods() -> None:
    both = {"kv_compression": "int8", "sparse_attention": {"method": "streaming_llm", "window": 64}}
    labels = [v.label for v in torchaccel_variants([{}, {"preset": "exact"}, both])]
    assert labels == ["torchaccel:exact", "torchaccel:int8+streaming_llm"]


def test_the_same_methods_with_other_parameters_get_a_number() -> None:
    windows = [{"sparse_attention": {"method": "streaming_llm", "window": w}} for w in (64, 128)]
    assert [v.label for v in torchaccel_variants(windows)] == ["torchaccel:streaming_llm", "torchaccel:streaming_llm#2"]


def test_decode_measures_exact_and_int8_by_default() -> None:
    assert [v.label for v in default_variants("decode", [])] == ["torchaccel:exact", "torchaccel:int8"]
    assert [v.label for v in default_variants("prefill", [])] == ["torchaccel:exact"]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(OptionsError, match="kv_compresion"):
        torchaccel_variants([{"kv_compresion": "int8"}])
