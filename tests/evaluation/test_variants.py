"""torchaccel variants from what a user types."""

from __future__ import annotations

import pytest

from torchaccel.errors import OptionsError
from torchaccel.evaluation.bench import default_variants
from torchaccel.evaluation.case import Case
from torchaccel.evaluation.variants import parse_options, torchaccel_variants


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


def test_a_run_without_fusion_is_a_variant_of_its_own() -> None:
    labels = [v.label for v in torchaccel_variants([{}, {"fusion": True}, {"fusion": False}])]
    assert labels == ["torchaccel:exact", "torchaccel:exact unfused"]


@pytest.mark.parametrize(
    ("case", "labels"),
    [
        (Case("decode", 8), ["exact", "int8"]),
        (Case("prefill", 8), ["exact"]),
        (Case("attention", 8, phase="decode"), ["exact", "int8", "streaming_llm"]),
        (Case("attention", 8, phase="prefill"), ["exact", "streaming_llm"]),
    ],
    ids=str,
)
def test_what_is_measured_by_default(case: Case, labels: list[str]) -> None:
    assert [v.label for v in default_variants(case, [])] == [f"torchaccel:{label}" for label in labels]


def test_attention_is_measured_in_one_of_two_phases() -> None:
    with pytest.raises(ValueError, match="unknown phase 'decoding' of attention; the phases are decode, prefill"):
        Case("attention", 8, phase="decoding")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(OptionsError, match="kv_compresion"):
        torchaccel_variants([{"kv_compresion": "int8"}])
