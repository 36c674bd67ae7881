"""SnapKV against masks over eager attention, and the worked example of its specification."""

import pytest
import torch
import torch.nn.functional as F
from torchaccel.passes.kv_compression.pyramidkv import PyramidKVPolicy
from torchaccel.passes.kv_compression.snapkv import SnapKVPolicy, pooled

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import A6, prompt_of
from tests.passes.kv_compression.masked_reference import Rule, grouped, marked, masked
from torchaccel.runtime.eviction import Budget


class SnapKVRule(Rule):
    def __init__(self, tokens, window, kernel):
        self.tokens, self.window, self.kernel = tokens, window, kernel

    def prompt(self, layer, q, k, v, weights, valid):
        tokens = k.shape[2]
        votes = grouped(weights[:, :, -self.window :].sum(2), k.shape[1]).mean(2)[..., : -self.window]
        votes = F.avg_pool1d(votes, self.kernel, 1, self.kernel // 2).masked_fill(
            ~valid[:, None, : -self.window], -torch.inf
        )
        kept = votes.topk(self.tokens - self.window, -1).indices
        recent = torch.arange(tokens - self.window, tokens).expand(*kept.shape[:2], -1)
        return marked(torch.cat([kept, recent], 2), tokens)


def test_generation_equals_the_masked_reference():
    options = {"kv_compression": {"method": "snapkv", "tokens": 24, "window": 6, "kernel": 3}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 60, padding=(0, 7))
    reference = masked(eager, SnapKVRule(24, 6, 3))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


def test_a_budget_beyond_the_prompt_is_exact():
    eager, fast = compiled("llama", options={"kv_compression": {"method": "snapkv", "tokens": 999}})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_worked_example():
    policy = SnapKVPolicy(Budget(tokens=4), window=2, kernel=3)
    votes = A6[-2:].sum(0)[None, None]
    torch.testing.assert_close(votes[..., :4], torch.tensor([[[0.15, 0.55, 0.5, 0.2]]]))
    torch.testing.assert_close(
        pooled(votes[..., :4], 3, "avg"), torch.tensor([[[0.23333, 0.4, 0.41667, 0.23333]]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(pooled(votes[..., :4], 3, "max"), torch.tensor([[[0.55, 0.55, 0.55, 0.5]]]))
    assert policy.keep(prompt_of(A6, 2)).tolist() == [[[1, 2, 4, 5]]]


def test_budgets_below_the_window_keep_the_newest_tokens():
    assert SnapKVPolicy(Budget(tokens=2), window=4).keep(prompt_of(A6, 4)).tolist() == [[[4, 5]]]
    few = PyramidKVPolicy(Budget(tokens=2), window=4)
    assert few.keep(prompt_of(A6, 4, 0, 2)).tolist() == [[[4, 5]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 5, "ratio": 0.5}, "one of tokens, ratio and bytes"), ({"window": 0}, "greater than or equal to 1")],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(torchaccel.errors.OptionsError, match=message):
        torchaccel.options.resolve({"kv_compression": {"method": "snapkv", **options}})
