"""Ada-KV against masks over eager attention, the worked examples of its specification, and the bytes it frees."""

import pytest
import torch
import torch.nn.functional as F
from torchaccel.passes.kv_compression.adakv import won
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked
from torchaccel.errors import OptionsError
from torchaccel.options import resolve

SNAPKV = {"method": "snapkv", "window": 6, "kernel": 3, "pooling": "avg"}


class AdaKVRule(Rule):
    """Head by head and row by row, as the publication says; scores are SnapKV's."""

    def __init__(self, tokens, window, kernel, alpha):
        self.tokens, self.window, self.kernel, self.alpha = tokens, window, kernel, alpha
        self.numbers = []

    def prompt(self, layer, q, k, v, weights, valid):
        batch, heads, tokens = k.shape[:3]
        votes = grouped(weights[:, :, -self.window :].sum(2), heads).mean(2)[..., : -self.window]
        votes = F.avg_pool1d(votes, self.kernel, 1, self.kernel // 2)
        base = self.tokens - self.window
        alive = torch.zeros(batch, heads, tokens, dtype=torch.bool)
        alive[..., -self.window :] = True
        for row in range(batch):
            entries = [
                (float(votes[row, head, column]), head, column)
                for head in range(heads)
                for column in range(tokens - self.window)
                if valid[row, column]
            ]
            entries.sort(key=lambda entry: -entry[0])
            for head in range(heads):
                wins = sum(1 for entry in entries[: heads * base] if entry[1] == head)
                number = round(wins * (1 - self.alpha) + int(base * self.alpha))
                self.numbers.append(number)
                for _, _, column in [entry for entry in entries if entry[1] == head][:number]:
                    alive[row, head, column] = True
        return alive


def adakv(**options):
    return {"kv_compression": {"method": "adakv", "scorer": SNAPKV, **options}, "strict": True}


def test_generation_equals_the_masked_reference():
    eager, fast = compiled("llama", options=adakv(tokens=24))
    inputs = prompt(2, 60, padding=(0, 7))
    rule = AdaKVRule(24, 6, 3, 0.2)
    reference = masked(eager, rule)
    # Storage grows twice on the way.
    assert torch.equal(greedy(fast, inputs, 80), greedy(reference, inputs, 80))
    assert len(set(rule.numbers)) > 2 and phases(fast) == ["prefill", "decode"]
    # Beams of a row keep the same tokens; their caches are reordered at every step.
    beams = {"num_beams": 3, "early_stopping": False}
    assert torch.equal(greedy(fast, inputs, 12, **beams), greedy(reference, inputs, 12, **beams))


def test_a_later_turn_equals_the_masked_reference():
    """Several tokens behind a compressed prompt: all are kept, as the tokens that are generated are."""
    eager, fast = compiled("llama", options=adakv(tokens=16, alpha=0.5))
    reference = masked(eager, AdaKVRule(16, 6, 3, 0.5))
    first, second = prompt(2, 42)["input_ids"], prompt(2, 40, seed=1)["input_ids"]
    results = []
    for model in (reference, fast):
        cache = DynamicCache(config=eager.config)
        with torch.no_grad():
            model(first, past_key_values=cache, use_cache=True)
            turn = model(second, past_key_values=cache, use_cache=True).logits
            step = model(first[:, :1], past_key_values=cache, use_cache=True).logits
        results.append(torch.cat([turn, step], 1))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=2e-4)
    assert phases(fast) == ["prefill", "extend", "decode"]


def test_a_budget_beyond_the_prompt_is_exact():
    eager, fast = compiled("llama", options=adakv(tokens=999))
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_bytes_are_those_of_the_budget():
    eager, fast = compiled("llama", dtype=torch.bfloat16, head_dim=64, options=adakv(ratio=0.25))
    ids, theirs, ours = prompt(1, 4000)["input_ids"], *(DynamicCache(config=eager.config) for _ in range(2))
    with torch.no_grad():
        for model, cache in ((eager, theirs), (fast, ours)):
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    # A quarter of the tokens, with columns of 4 bytes; of 1000 tokens per head room for a sixteenth, a page at most.
    token = 1 + 4 / 256
    assert 0.25 * token < torchaccel.kv_bytes(ours) / torchaccel.kv_bytes(theirs) < 0.25 * token * (1 + 0.0625 + 0.034)
    counts = [layer.keys.physical.segments.counts for layer in ours.layers]
    assert all(abs(int(count.sum()) - 1000 * count.numel()) <= count.numel() for count in counts)
    assert any(len(set(count.flatten().tolist())) > 1 for count in counts)


@pytest.mark.parametrize(("alpha", "numbers"), [(0.0, [1, 3]), (0.2, [1, 2]), (0.5, [2, 2]), (1.0, [2, 2])])
def test_worked_example(alpha, numbers):
    scores = torch.tensor([[[0.9, 0.05, 0.03, 0.02], [0.4, 0.3, 0.2, 0.1]]])
    kept = won(scores, torch.ones_like(scores, dtype=torch.bool), torch.tensor([2]), alpha)
    assert kept.sum(-1).tolist() == [numbers]
    # Scores fall: each head keeps its first ones.
    assert kept.tolist() == [[[place < number for place in range(4)] for number in numbers]]


def test_padding_never_counts():
    scores = torch.tensor([[[0.5, 0.9, 0.4, 0.3], [0.5, 0.1, 0.2, 0.1]]])
    rivals = torch.tensor([[[False, True, True, True]] * 2])
    kept = won(scores, rivals, torch.tensor([2]), 0.0)
    assert kept.tolist() == [[[False, True, True, True], [False, False, True, False]]]


def test_normalised_scores():
    """The second head's best tokens have half of its mass, and count half."""
    scores = torch.tensor([[[0.6, 0.4, 0.0, 0.0], [1.2, 0.0, 0.6, 0.6]]])
    every = torch.ones_like(scores, dtype=torch.bool)
    assert won(scores, every, torch.tensor([1]), 0.0).tolist() == [[[True, False, False, False], [True] + [False] * 3]]
    kept = won(scores, every, torch.tensor([1]), 0.0, normalize=True)
    assert kept.tolist() == [[[True, False, False, False], [True, False, False, False]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "tova"}, "scorer is one of snapkv"),
        ({"scorer": {"method": "h2o", "tokens": 9}}, "tokens are options of adakv"),
        ({"scorer": {"method": "snapkv", "window": 0}}, "greater than or equal to 1"),
        ({"alpha": 2}, "less than or equal to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionsError, match=message):
        resolve({"kv_compression": {"method": "adakv", **options}})
