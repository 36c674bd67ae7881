"""DuoAttention against masks over eager attention; what streaming heads store does not grow."""

import torch

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import Rule, masked

HEADS = {0: (1,), 2: (0, 1)}
SMALL = {"method": "duo_attention", "retrieval_heads": HEADS, "sinks": 3, "recent": 9}


class DuoRule(Rule):
    """A streaming head's query in column t sees the row's first real tokens and columns above t - recent."""

    def __init__(self, heads, sinks, recent):
        self.heads, self.sinks, self.recent = heads, sinks, recent

    def seen_by(self, layer, shape, query):
        alive = torch.ones(shape, dtype=torch.bool)
        column = torch.arange(shape[2])
        first = self.valid.int().argmax(-1)[:, None]
        near = (column > query - self.recent) | ((column >= first) & (column < first + self.sinks))
        for head in range(shape[1]):
            if head not in self.heads.get(layer, ()):
                alive[:, head] = near
        return alive

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid = valid
        return self.seen_by(layer, k.shape[:3], k.shape[2])

    def step(self, layer, weights, alive):
        self.valid = torch.nn.functional.pad(self.valid, (0, alive.shape[2] - self.valid.shape[1]), value=True)
        return self.seen_by(layer, alive.shape, alive.shape[2])


def test_generation_equals_the_masked_reference():
    eager, fast = compiled("llama", options={"kv_compression": SMALL, "strict": True})
    inputs = prompt(2, 60, padding=(0, 7))
    reference = masked(eager, DuoRule(HEADS, 3, 9))
    assert torch.equal(greedy(fast, inputs, 80), greedy(reference, inputs, 80))
    assert phases(fast) == ["prefill", "decode"]
    # Three of six heads; a layer of retrieval heads is exact.
    assert {site.layout for site in torchaccel.report(fast).records[1].sites} == {"dense DuoAttentionPolicy", "dense"}
