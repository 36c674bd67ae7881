"""A-shape against a mask over eager attention: prompts alone are masked."""

import torchaccel
from tests.passes.static_reference import assert_exact, assert_generation_equals_the_rule

METHOD = {"method": "a_shape", "sinks": 3, "window": 9}


def seen(layer, head, first, query, key, new):
    return new == 1 or key < first + 3 or query - key < 9


def test_generation_equals_the_masked_reference():
    fast = assert_generation_equals_the_rule(METHOD, seen, tokens=42, padding=(0, 6))
    assert torchaccel.report(fast).effective == {"a_shape": {"prefill": 3}}


def test_a_window_over_everything_is_exact():
    assert_exact({"method": "a_shape", "sinks": 0, "window": 4096})
