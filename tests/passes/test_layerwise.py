"""The option ``layers``: which layers a method treats, and what happens to names of layers there are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torchaccel.passes.layerwise import LayerwiseOptions

import torchaccel
from tests.models.families import build
from torchaccel.errors import OptionsError

TOKENS = torch.arange(1, 41)[None]


def test_all_layers_by_default_and_negative_ones_from_the_last() -> None:
    assert LayerwiseOptions().select(3) == {0, 1, 2}
    assert LayerwiseOptions(layers=(0, -1)).select(3) == {0, 2}
    with pytest.raises(IndexError, match=r"layer 3 of 3"):
        LayerwiseOptions(layers=(3,)).select(3)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_compression": {"method": "int8", "layers": [1]}},
        {"sparse_attention": {"method": "streaming_llm", "sinks": 1, "window": 4, "layers": [1]}},
    ],
    ids=["int8", "streaming_llm"],
)
def test_only_the_named_layer_is_treated(options: dict) -> None:
    report = torchaccel.explain(build("llama"), TOKENS, options=options)
    treated = [r for r in report.records[0].passes if r.fidelity.value == "approx"]
    assert [len(r.sites) for r in treated] == [1]
    assert "layers.1" in treated[0].sites[0]


def test_skipping_is_kept_to_the_named_layers() -> None:
    def skipped(**more: object) -> list[str]:
        options = {"layer_skipping": {"method": "unified", "target_speedup": 1.5, **more}}
        passes = torchaccel.explain(build("llama"), TOKENS, options=options).records[0].passes
        return next(result.sites for result in passes if result.name == "unified")

    assert [name.rpartition(".")[2] for name in skipped()] == ["1"]
    assert skipped(layers=[1]) == skipped()
    assert skipped(layers=[2]) == []


def test_a_layer_there_is_not_is_declined_with_the_number() -> None:
    options = {"kv_compression": {"method": "int8", "layers": [7]}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = torchaccel.explain(build("llama"), TOKENS, options=options)
    assert any("layer 7 of 3" in line for line in report.declines)
    assert any("layer 7 of 3" in str(warning.message) for warning in caught)
    with pytest.raises(BackendCompilerFailed, match=r"DeclinedError.*\n*.*layer 7 of 3"):
        torchaccel.explain(build("llama"), TOKENS, options=options | {"strict": True})


def test_layers_must_be_numbers() -> None:
    with pytest.raises(OptionsError, match=r"kv_compression.layers"):
        torchaccel.explain(build("llama"), TOKENS, options={"kv_compression": {"method": "int8", "layers": "first"}})
