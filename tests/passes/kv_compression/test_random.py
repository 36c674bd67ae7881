"""Random eviction against masks over eager attention that are given the tokens it drew."""

import pytest
import torch
from torchaccel.passes.kv_compression.random import RandomPolicy

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import A6, prompt_of
from tests.passes.kv_compression.masked_reference import Rule, marked, masked
from torchaccel.runtime.eviction import Budget, Step


class DrawnRule(Rule):
    """Keeps, of the prompt, the real tokens with the highest numbers of the documented draw."""

    def __init__(self, tokens, seed):
        self.tokens, self.seed = tokens, seed

    def prompt(self, layer, q, k, v, weights, valid):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + layer)
        lots = torch.rand(*k.shape[:3], generator=generator).masked_fill(~valid[:, None], -1.0)
        return marked(lots.topk(self.tokens).indices, k.shape[2])


def test_generation_equals_the_masked_reference():
    options = {"kv_compression": {"method": "random", "tokens": 21, "seed": 3}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 42, padding=(0, 7))
    reference = masked(eager, DrawnRule(21, 3))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


def test_seeds_draw_different_tokens_and_the_same_ones_again():
    kept = [RandomPolicy(Budget(tokens=3), seed).keep(prompt_of(A6)).tolist() for seed in (0, 0, 1, 2, 3)]
    assert kept[0] == kept[1]
    assert any(other != kept[0] for other in kept[2:])


@pytest.mark.parametrize("stored, evicts", [(8, False), (9, True)])
def test_decoding_evicts_the_lowest_lots_every_interval(stored, evicts):
    policy = RandomPolicy(Budget(tokens=6), interval=3, grows=False)
    state = {"lot": torch.rand(2, 3, stored)}
    old = state["lot"].clone()
    step = Step(mass=None, stored=stored, fresh=2, group=1, count=5)
    policy.observe(state, step)
    assert torch.equal(state["lot"][..., :-2], old[..., :-2])
    assert not torch.equal(state["lot"][..., -2:], old[..., -2:])
    kept = policy.evict(state, step, 6)
    if not evicts:
        assert kept is None
        return
    assert torch.equal(kept, state["lot"].topk(6).indices.sort(-1).values)
