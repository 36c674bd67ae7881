"""Plans with switch points, measured times that overrule predictions, and the gate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.calibration import Calibration, Coefficients
from torchaccel.cost.choose import GAIN, candidate_ms, choose, first_true, gate
from torchaccel.cost.devices import device_facts
from torchaccel.cost.shape import AttentionShape

from .test_roofline import attention

CPU = device_facts("avx512_bf16")
SHAPE = AttentionShape(1, 4, 1, 0, sites=32)
CPP, COMPOSED = Candidate("cpp"), Candidate("composed")
# Stock operators start at once, generated code is slow to start and fast afterwards.
LATE = Calibration(
    {
        "cpu/cpp/decode_attention/bfloat16": Coefficients(call_us=1000.0),
        "cpu/composed/decode_attention/bfloat16": Coefficients(launch=0.0),
    }
)


class Measured:
    """Times and failures by candidate, whatever the shape."""

    def __init__(self, times: dict[Candidate, float], failed: tuple[Candidate, ...] = ()) -> None:
        self.times, self.failed = times, failed

    def __call__(self, spec: AttentionSpec, shape: AttentionShape, candidate: Candidate) -> float | None:
        return self.times.get(candidate)

    def failure(self, spec: AttentionSpec, shape: AttentionShape, candidate: Candidate) -> object | None:
        return "crashed" if candidate in self.failed else None


def test_the_switch_point_is_where_the_lines_cross() -> None:
    plan = choose(attention(), (CPP, COMPOSED), SHAPE, CPU, calibration=LATE)
    (limit, first), (last, second) = plan.picks
    assert (first, second, last) == (COMPOSED, CPP, None)
    assert limit is not None

    def ratio(tokens: int) -> float:
        costs = (candidate_ms(attention(), c, SHAPE.at(tokens), CPU, None, LATE) for c in (COMPOSED, CPP))
        return next(costs) / next(costs)

    assert ratio(limit) <= GAIN < ratio(limit + 1)
    assert Plan.from_key(plan.key()) == plan


def test_candidates_that_cannot_be_told_apart_keep_their_order() -> None:
    single, stream = (Candidate("cpp", (("split", name),)) for name in ("single", "stream"))
    one = replace(CPU, processors=1)
    for order in ((stream, single), (single, stream)):
        plan = choose(attention(), order, SHAPE, one)
        assert plan.picks == ((None, order[0]),)


def test_measured_times_overrule_predictions() -> None:
    plan = choose(attention(), (CPP, COMPOSED), SHAPE, CPU, Measured({CPP: 5.0, COMPOSED: 1.0}))
    assert plan.picks == ((None, COMPOSED),)


def test_what_failed_is_never_taken() -> None:
    plan = choose(attention(), (CPP, COMPOSED), SHAPE, CPU, Measured({}, (CPP,)))
    assert plan.picks == ((None, COMPOSED),)
    with pytest.raises(ValueError, match=r"no candidate runs .* tried cpp: add the reference"):
        choose(attention(), (CPP,), SHAPE, CPU, Measured({}, (CPP,)))
    with pytest.raises(ValueError, match="tried none"):
        choose(attention(), (), SHAPE, CPU)


def both(spec: AttentionSpec, kind: str) -> tuple[Candidate, ...]:
    return (CPP, COMPOSED)


def test_a_window_pays_only_beyond_its_length() -> None:
    sparse = replace(attention(), window=1024, sinks=4)
    short, long = (gate(sparse, attention(), SHAPE.at(n), CPU, choices=both) for n in (512, 65536))
    assert long.ok and long.predicted_ms < long.exact_ms / 8
    assert short.predicted_ms == pytest.approx(short.exact_ms)
    assert short.switch_tokens == long.switch_tokens and 1028 < (long.switch_tokens or 0) < 2048
    assert f"it pays from {long.switch_tokens} tokens on" in long.text
    assert "window 4 + 1024 decode attention over 65536 tokens" in long.text


def test_a_slower_site_is_refused_with_numbers() -> None:
    slow = Calibration(
        {
            "cpu/cpp/decode_attention/bfloat16": Coefficients(),
            "cpu/cpp/decode_attention/int8": Coefficients(call_us=100.0),
            "cpu/composed/decode_attention/int8": Coefficients(call_us=1e6),
        }
    )
    few, many = (gate(attention(kind="int8"), attention(), SHAPE.at(n), CPU, None, slow, both) for n in (256, 262144))
    assert not few.ok and many.ok
    assert few.predicted_ms > few.exact_ms and f"{few.exact_ms:.4g} ms" in few.text
    turn = few.switch_tokens
    assert turn is not None and 256 < turn < 262144
    assert gate(attention(kind="int8"), attention(), SHAPE.at(turn), CPU, None, slow, both).ok


def test_a_site_that_never_pays_says_so() -> None:
    slow = Calibration(
        {
            "cpu/cpp/decode_attention/bfloat16": Coefficients(),
            "cpu/cpp/decode_attention/int8": Coefficients(code_ns=100.0),
            "cpu/composed/decode_attention/int8": Coefficients(code_ns=100.0),
        }
    )
    verdict = gate(attention(kind="int8"), attention(), SHAPE.at(4096), CPU, None, slow, both)
    assert not verdict.ok and verdict.switch_tokens is None and "it pays at no length" in verdict.text


def test_bisection() -> None:
    assert first_true(lambda n: n >= 37, 1, 1000) == 37
    assert first_true(lambda n: True, 4, 5) == 5
    assert math.isfinite(first_true(lambda n: n > 999, 1, 1000))
