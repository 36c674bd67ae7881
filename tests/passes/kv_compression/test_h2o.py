"""H2O against masks over eager attention, and the worked example of its specification."""

import pytest
import torch
from torchaccel.passes.kv_compression.h2o import H2OPolicy
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import A6, prompt_of
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked
from torchaccel.runtime.eviction import Budget, Step
from torchaccel.runtime.kv import writable


class H2ORule(Rule):
    def __init__(self, tokens, recent, interval):
        self.tokens, self.recent, self.interval = tokens, recent, interval
        self.score = {}

    def choose(self, score, alive):
        """Heavy hitters among the living, and the last living tokens."""
        keep = torch.zeros_like(alive)
        for row, head in torch.ones(alive.shape[:2]).nonzero().tolist():
            living = alive[row, head].nonzero().flatten()
            old = living[: len(living) - self.recent]
            hitters = old[score[row, head][old].topk(self.tokens - self.recent).indices]
            keep[row, head, hitters] = True
            keep[row, head, living[len(living) - self.recent :]] = True
        return keep

    def prompt(self, layer, q, k, v, weights, valid):
        score = grouped(weights.sum(2), k.shape[1]).sum(2).masked_fill(~valid[:, None], -1e9)
        self.score[layer] = score
        return self.choose(score, torch.ones_like(score, dtype=torch.bool))

    def step(self, layer, weights, alive):
        received = grouped(weights.sum(2), alive.shape[1]).sum(2)
        old = self.score[layer]
        self.score[layer] = torch.nn.functional.pad(old, (0, received.shape[-1] - old.shape[-1])) + received
        if alive[0, 0].sum() < self.tokens + self.interval:
            return alive
        return self.choose(self.score[layer], alive)


@pytest.mark.parametrize("interval", [1, 5])
def test_generation_equals_the_masked_reference(interval):
    options = {"kv_compression": {"method": "h2o", "tokens": 20, "interval": interval}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 42, padding=(0, 7))
    reference = masked(eager, H2ORule(20, 10, interval))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]
    stored = [record.counter.kv_bytes for record in torchaccel.report(fast).records]
    assert stored[0] == stored[1]  # the cache does not grow


def test_worked_example():
    policy = H2OPolicy(Budget(tokens=4), recent=0.5, interval=1)
    first = prompt_of(A6)
    kept = policy.keep(first)
    assert kept.tolist() == [[[0, 1, 4, 5]]]
    state = {name: torch.nn.functional.pad(x, (0, 1)) for name, x in policy.state(first, kept).items()}
    step = Step(torch.tensor([[[0.1, 0.3, 0.1, 0.2, 0.3]]]), 5, 1, 1, 1)
    policy.observe(state, step)
    torch.testing.assert_close(state["received"], torch.tensor([[[2.25, 1.75, 0.5, 0.4, 0.3]]]))
    assert policy.evict(state, step, 4).tolist() == [[[0, 1, 3, 4]]]


def test_a_budget_beyond_all_tokens_is_exact():
    eager, fast = compiled("llama", options={"kv_compression": {"method": "h2o", "tokens": 999}})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_tokens_after_a_crop_begin_without_the_scores_of_those_given_up():
    _, fast = compiled("llama", options={"kv_compression": {"method": "h2o", "tokens": 20}, "strict": True})
    cache = DynamicCache()
    with torch.no_grad():
        fast(prompt(1, 42)["input_ids"], past_key_values=cache, use_cache=True)
        for seed in range(3):
            fast(prompt(1, 1, seed=seed)["input_ids"], past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys
    received = keys.physical.record.state["received"]
    assert (received[..., 20:23] > 0).all()
    cropped = writable(keys[..., :-2, :], 1)
    assert cropped.end == 21 and (received[..., 21:] == 0).all() and (received[..., :21] > 0).all()
