"""What the cost model says of the bytes of a cache, against what methods ask for; no method is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchaccel.passes.base import SitePlan

from torchaccel.cost.model import ModelSizes
from torchaccel.cost.predict import predict_model
from torchaccel.cost.traffic import Traffic
from torchaccel.evaluation.variants import requested
from torchaccel.methods import FAMILIES

SIZES = ModelSizes("bfloat16", 32, 32, 8, 128, 218_103_808, 525_336_576, 16_060_522_496)
METHODS = {method.name: method for method in FAMILIES["kv_compression"]}


def canonical(name: str, **options: Any) -> dict[str, Any]:
    """Options with every parameter, with a plan that is not looked at where the method needs one."""
    if METHODS[name].calibration == "required" and "retrieval_heads" not in METHODS[name].Options.model_fields:
        return {"method": name, **METHODS[name].Options.model_construct(**options).model_dump()}
    if name == "duo_attention":
        options = {"retrieval_heads": {0: (0, 1)}} | options
    return requested({"kv_compression": {"method": name, **options}})["kv_compression"]


def test_every_method_of_the_family_is_predicted() -> None:
    for name in METHODS:
        assert not Traffic({"kv_compression": canonical(name)}).unknown, name
        found = predict_model(SIZES, 32768, {"kv_compression": canonical(name)}, "h200")
        assert found.asked.kv_bytes < 0.9 * found.exact.kv_bytes, name
        # Rebuilding keys and values of latents takes longer than reading them there.
        assert name == "cskv" or found.asked.decode_attention_ms < 1.2 * found.exact.decode_attention_ms, name


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {}),
        ("int4", {"group": 128, "window": 0}),
        ("int2", {"group": 32}),
        ("gear", {"bits": 4, "rank": 3, "outliers": 0}),
        ("turboquant", {"key_bits": 4, "value_bits": 2, "window": 7}),
    ],
)
def test_formats_are_those_of_the_method(name: str, options: dict[str, Any], dim: int) -> None:
    method = METHODS[name](METHODS[name].Options(**options))
    asked = {"kv_compression": canonical(name, **options)}
    assert Traffic(asked).formats("bfloat16", dim) == method.formats("bfloat16", dim)


def test_classes_are_those_of_zipcache() -> None:
    options = {"ratio": 0.25, "high_bits": 8, "low_bits": 4, "interval": 200}
    plan = SitePlan()
    METHODS["zipcache"](METHODS["zipcache"].Options(**options)).treat(
        plan, SimpleNamespace(dtype=torch.bfloat16, head_dim=64)
    )
    parts = Traffic({"kv_compression": canonical("zipcache", **options)}).parts(1000, "bfloat16", 64, 2, 3)
    assert plan.mixing is not None and [part.formats for part in parts[:2]] == [plan.mixing.low, plan.mixing.high]
    assert [part.tokens for part in parts] == [225, 675, 100]
    # 8 bits, 4 bits and their scales; 16 bits.
    assert parts[2].nbytes == 100 * 2 * 64 * 2 and parts[0].columns == parts[1].columns == 4


def test_latents_are_as_many_as_cskv_makes() -> None:
    asked = canonical("cskv", key_density=0.3, value_density=1.0, window=16)
    keys, values = Traffic({"kv_compression": asked}).formats("float32", 80)
    assert (keys.kind, keys.rank, keys.block, keys.window) == ("latent", 24, 16, 1) and values.kind == "dense"


def test_streaming_heads_keep_sinks_and_a_window() -> None:
    by_name = canonical("duo_attention", retrieval_heads={0: (0,), 2: (0, 1)}, sinks=10, recent=90)
    # 3 of 8 heads keep all of 1000 tokens, the others 100.
    (part,) = Traffic({"kv_compression": by_name}).parts(1000, "bfloat16", 64, 2, 4)
    assert part.tokens == pytest.approx((3 * 1000 + 5 * 100) / 8)
    by_plan = {**by_name, "retrieval_heads": None, "sparsity": 0.75}
    (part,) = Traffic({"kv_compression": by_plan}).parts(1000, "bfloat16", 64, 2, 4)
    assert part.tokens == pytest.approx(0.25 * 1000 + 0.75 * 100)


def test_of_two_formats_the_first_counts() -> None:
    both = {"kv_compression": [canonical("int8"), canonical("zipcache"), canonical("int2")]}
    assert Traffic(both).formats("bfloat16", 64)[0].kind == "int8"
    assert [part.formats[0].kind for part in Traffic(both).parts(1000, "bfloat16", 64, 2, 2)] == ["int8"]
