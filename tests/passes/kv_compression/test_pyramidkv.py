"""PyramidKV: budgets fall with the layer as in the worked examples; selection is SnapKV's."""

import pytest
import torch
from torchaccel.passes.kv_compression.pyramidkv import pyramid

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import masked
from tests.passes.kv_compression.test_snapkv import SnapKVRule


class PyramidRule(SnapKVRule):
    """Budgets of the three layers for 24 tokens, 6 of them the window's, beta 20, 60 - 6 tokens to choose from."""

    budgets = (42, 24, 7)

    def prompt(self, layer, *rest):
        self.tokens = self.budgets[layer]
        return super().prompt(layer, *rest)


@pytest.mark.parametrize(
    ("base", "room", "layers", "budgets"),
    [(32, 10**6, 4, [63, 43, 23, 3]), (32, 56, 4, [56, 40, 24, 8]), (32, 30, 4, [32, 32, 32, 32])],
)
def test_budgets_of_the_specification(base, room, layers, budgets):
    assert [pyramid(base, room, layer, layers, 20) for layer in range(layers)] == budgets


def test_generation_equals_the_masked_reference():
    options = {"kv_compression": {"method": "pyramidkv", "tokens": 24, "window": 6, "kernel": 3}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 60, padding=(0, 3))
    reference = masked(eager, PyramidRule(24, 6, 3))
    assert torch.equal(greedy(fast, inputs, 30), greedy(reference, inputs, 30))
    assert phases(fast) == ["prefill", "decode"]
    assert torchaccel.report(fast).records[1].counter.kv_bytes > 0
