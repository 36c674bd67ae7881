"""TOVA against masks over eager attention, and the worked example of its specification."""

import pytest
import torch
from torchaccel.passes.kv_compression.tova import TovaPolicy

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import A6, prompt_of
from tests.passes.kv_compression.masked_reference import Rule, marked, masked
from torchaccel.runtime.eviction import Budget


class TovaRule(Rule):
    def __init__(self, tokens, interval):
        self.tokens, self.interval = tokens, interval

    def cut(self, weights, hidden, heads):
        mean = weights[:, :, -1].mean(1).masked_fill(hidden, -1.0)
        kept = mean.topk(self.tokens).indices
        return marked(kept[:, None], mean.shape[-1]).expand(-1, heads, -1)

    def prompt(self, layer, q, k, v, weights, valid):
        return self.cut(weights, ~valid, k.shape[1])

    def step(self, layer, weights, alive):
        full = alive[0, 0].sum() >= self.tokens + self.interval
        return self.cut(weights, ~alive[:, 0], alive.shape[1]) if full else alive


@pytest.mark.parametrize("interval", [1, 6])
def test_generation_equals_the_masked_reference(interval):
    options = {"kv_compression": {"method": "tova", "tokens": 21, "interval": interval}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 42, padding=(0, 7))
    reference = masked(eager, TovaRule(21, interval))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


def test_worked_example():
    assert TovaPolicy(Budget(tokens=3)).keep(prompt_of(A6)).tolist() == [[[1, 2, 5]]]
