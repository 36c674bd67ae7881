"""Sliding window against a mask over eager attention."""

import pytest

import torchaccel
from tests.passes.static_reference import assert_exact, assert_generation_equals_the_rule
from torchaccel.errors import OptionsError
from torchaccel.options import resolve

WINDOW = 9


def recent(layer, head, first, query, key, new):
    return query - key < WINDOW


def test_generation_equals_the_masked_reference():
    method = {"method": "sliding_window", "window": WINDOW}
    fast = assert_generation_equals_the_rule(method, recent, tokens=42, padding=(0, 6))
    assert {(site.window, site.sinks) for record in torchaccel.report(fast).records for site in record.sites} == {
        (9, 0)
    }


def test_capped_scores_and_layers_with_windows_of_their_own():
    """Every other layer of the model slides already, and says that it is left alone."""

    def rule(layer, *pair):
        return layer % 2 == 0 or recent(layer, *pair)

    method = {"method": "sliding_window", "window": WINDOW}
    with pytest.warns(UserWarning, match="sliding_window left 2 site.*already attends to a sliding window"):
        assert_generation_equals_the_rule(
            method, rule, tokens=42, padding=(0, 6), new=8, family="gemma2", strict=False, attn_logit_softcapping=2.0
        )


def test_a_window_over_everything_is_exact():
    assert_exact({"method": "sliding_window", "window": 4096})


def test_options_are_checked():
    with pytest.raises(OptionsError, match="window"):
        resolve({"sparse_attention": {"method": "sliding_window", "window": 0}})
