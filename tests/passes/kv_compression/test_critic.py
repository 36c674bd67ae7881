"""CRITIC against masks over eager attention, and the worked example of its specification."""

import pytest
import torch
from torchaccel.passes.kv_compression.critic import CriticPolicy, scaled

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import prompt_of
from tests.passes.kv_compression.masked_reference import Rule, marked, masked
from torchaccel.runtime.eviction import Budget


def entropy(rows, visible):
    """Entropy of the mean over heads ``[B, Q, n]``, over that of an even distribution."""
    return -(rows * (rows + 1e-9).log()).sum(-1) / visible.float().clamp(min=2).log()


def minmax(x, valid):
    low = torch.where(valid, x, 1e9).amin(-1, keepdim=True)
    high = torch.where(valid, x, -1e9).amax(-1, keepdim=True)
    return (x - low) / (high - low + 1e-9)


class CriticRule(Rule):
    def __init__(self, tokens, interval, recent):
        self.tokens, self.interval, self.recent, self.memory = tokens, interval, recent, {}

    def cut(self, layer, alive):
        received, spread = self.memory[layer]
        real = torch.nn.functional.pad(self.valid, (0, alive.shape[2] - self.valid.shape[1]), value=True)
        live = alive[:, 0] & real
        score = 0.5 * minmax(received, live) + 0.5 * minmax(spread, live)
        score = torch.where(real, score, -1.0)
        # The newest of those that are stored, which are equally many in all rows.
        newest = alive[:, 0].flip(-1).cumsum(-1).flip(-1) <= round(self.recent * self.tokens)
        score = score.masked_fill(newest, 9.0).masked_fill(~alive[:, 0], -2.0)
        return marked(score.topk(self.tokens).indices[:, None], score.shape[-1]).expand_as(alive)

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid = valid
        mean = weights.mean(1)
        self.memory[layer] = [mean.sum(1), entropy(mean, valid.int().cumsum(-1))]
        return self.cut(layer, torch.ones(k.shape[:3], dtype=torch.bool))

    def step(self, layer, weights, alive):
        received, spread = (torch.nn.functional.pad(x, (0, 1)) for x in self.memory[layer])
        mean = weights.mean(1)
        real = torch.nn.functional.pad(self.valid, (0, alive.shape[2] - self.valid.shape[1]), value=True)
        seen = (alive[:, 0] & real).sum(-1, keepdim=True)
        spread[:, -1:] = entropy(mean, seen)
        self.memory[layer] = [received + mean[:, 0], spread]
        full = alive[0, 0].sum() >= self.tokens + self.interval
        return self.cut(layer, alive) if full else alive


@pytest.mark.parametrize("recent", [0.0, 0.3])
def test_generation_equals_the_masked_reference(recent):
    options = {"kv_compression": {"method": "critic", "tokens": 24, "interval": 6, "recent": recent}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 42, padding=(0, 7))
    reference = masked(eager, CriticRule(24, 6, recent))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


def test_worked_example():
    attention = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    prompt = prompt_of(attention, window=4)
    received, spread = CriticPolicy(Budget(tokens=2))._prompt(prompt)
    torch.testing.assert_close(received, torch.tensor([[1.85, 0.95, 0.8, 0.4]]))
    torch.testing.assert_close(
        scaled(received, prompt.valid), torch.tensor([[1, 0.37931, 0.27586, 0]]), atol=1e-5, rtol=0
    )
    bits = spread * torch.arange(1, 5).clamp(min=2).log()
    torch.testing.assert_close(bits, torch.tensor([[0, 0.69315, 1.03972, 1.27985]]), atol=1e-4, rtol=0)
