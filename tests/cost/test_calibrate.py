"""Fitting coefficients: known ones are found again, strangers' processes do not bend them, JSON keeps them."""

from __future__ import annotations

import json
import math

import pytest
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.spec import LinearSpec

from torchaccel.cost.calibrate import calibrate
from torchaccel.cost.calibration import UNMEASURED, Calibration, Coefficients, shipped
from torchaccel.cost.devices import device_facts
from torchaccel.cost.roofline import predict_ms
from torchaccel.cost.shape import AttentionShape

from .test_roofline import attention

CPU = device_facts("avx512")
KEY = "cpu/cpp/decode_attention/bfloat16"
TRUTH = Calibration({KEY: Coefficients(1.3, 1.6, 2.5, 0.4, 0.05, 0.5, 0.3, 4.0)})
SHAPES = [
    AttentionShape(batch, heads, 1, tokens, sites=sites)
    for batch in (1, 4)
    for heads in (1, 4)
    for tokens in (64, 512, 4096, 32768)
    for sites in (1, 64)
]


def samples(slow: float = 1.0) -> list:
    spec, candidate = attention(), Candidate("cpp")
    times = [predict_ms(spec, candidate, shape, CPU, TRUTH) for shape in SHAPES]
    return [
        (spec, shape, candidate, ms * (slow if i % 8 == 3 else 1))
        for i, (shape, ms) in enumerate(zip(SHAPES, times, strict=True))
    ]


@pytest.mark.parametrize("slow", [1.0, 10.0])
def test_known_coefficients_are_found_again(slow: float) -> None:
    fitted = calibrate(samples(slow), CPU, "paper")
    errors = [
        abs(math.log(predict_ms(attention(), Candidate("cpp"), shape, CPU, fitted) / ms))
        for (_, shape, _, ms) in samples()
    ]
    assert sorted(errors)[len(errors) // 2] < 0.05
    assert max(errors) < 0.35
    assert fitted.source == "paper"


def test_calibration_survives_json_and_refuses_another_version() -> None:
    found = json.loads(json.dumps(TRUTH.to_dict()))
    assert Calibration.from_dict(found) == TRUTH
    with pytest.raises(ValueError, match="version 1 is needed; found 7"):
        Calibration.from_dict(found | {"version": 7})
    with pytest.raises(ValueError, match="found memory"):
        Calibration.from_dict({"version": 1, "source": "", "entries": {KEY: {"memory": 1.0}}})


def test_too_few_samples_fit_nothing() -> None:
    assert calibrate(samples()[:3], CPU).entries == {}


def test_relatives_lend_their_coefficients() -> None:
    assert TRUTH.of(attention(kind="int4"), Candidate("cpp"), "cpu") == TRUTH.entries[KEY]
    assert TRUTH.of(LinearSpec("bfloat16", 1, False), Candidate("cpp"), "cpu") == UNMEASURED["cpu"]
    assert TRUTH.of(attention(), Candidate("triton"), "cuda") == UNMEASURED["cuda"]


def test_the_shipped_calibration_names_its_machine_and_claims_no_gpu() -> None:
    assert "AMD EPYC" in shipped().source
    assert {KEY, "cpu/cpp/decode_attention/int8", "cpu/cpp/linear/bfloat16"} <= set(shipped().entries)
    assert all(key.startswith("cpu/") for key in shipped().entries)
