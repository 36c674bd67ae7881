"""TidalDecode against a mask over eager attention, and the worked example of its specification."""

import pytest
import torch
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing

METHOD = {"method": "tidal_decode", "tokens": 24, "dense_layers": 1, "reselect": [3]}


class TidalRule(Lister):
    """Layers ``choosing`` see everything; those behind see what the last of them gave most probability."""

    def __init__(self, tokens, choosing):
        self.tokens, self.choosing = tokens, choosing

    def step(self, layer, q, k, valid):
        if layer < min(self.choosing):
            return torch.ones(k.shape[:3], dtype=torch.bool)
        if layer not in self.choosing:
            return self.chosen.clone()
        self.chosen = torch.zeros(k.shape[:3], dtype=torch.bool)
        for b, h in torch.ones(k.shape[:2]).nonzero().tolist():
            logits = q[b].unflatten(0, (k.shape[1], -1))[h, :, 0] @ k[b, h].T * k.shape[3] ** -0.5
            given = torch.softmax(logits.masked_fill(~valid[b], -torch.inf), -1).sum(0)[:-1]
            self.chosen[b, h, given.topk(min(self.tokens - 1, len(given))).indices] = True
        return torch.ones_like(self.chosen)


def pair(rule=None, layers=5, **arguments):
    eager, fast = compiled("llama", layers=layers, options={"sparse_attention": METHOD, **arguments})
    return eager, listing(compiled("llama", layers=layers)[0], rule or TidalRule(24, (1, 3))), fast


@pytest.mark.parametrize("padding", [(0, 0), (0, 21)])
def test_generation_equals_the_masked_reference(padding):
    eager, reference, fast = pair(strict=True)
    inputs = prompt(2, 90, padding=padding)
    found = greedy(reference, inputs, 64)
    assert torch.equal(greedy(fast, inputs, 64), found)
    assert not torch.equal(found, greedy(eager, inputs, 64))
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)
