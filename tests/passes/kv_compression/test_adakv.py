"""Ada-KV against masks over eager attention, the worked examples of its specification, and the bytes it frees."""

import torch
import torch.nn.functional as F

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked

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


def test_generation_equals_the_masked_reference():
    options = {"kv_compression": {"method": "adakv", "tokens": 24, "scorer": SNAPKV}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 60, padding=(0, 7))
    rule = AdaKVRule(24, 6, 3, 0.2)
    reference = masked(eager, rule)
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert len(set(rule.numbers)) > 2
    assert phases(fast) == ["prefill", "decode"]
