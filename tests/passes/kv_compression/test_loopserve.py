"""LoopServe's progressive compression against masks over eager attention."""

import torch
from torchaccel.passes.kv_compression.loopserve import LoopServePolicy

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked
from torchaccel.runtime.eviction import Budget, Step


class LoopRule(Rule):
    def __init__(self, tokens, interval, sinks):
        self.tokens, self.interval, self.sinks = tokens, interval, sinks
        self.rows = {}

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid, self.length, self.rows[layer] = valid, k.shape[2], []
        return torch.ones(k.shape[:3], dtype=torch.bool)

    def step(self, layer, weights, alive):
        self.rows[layer].append(grouped(weights[:, :, -1], alive.shape[1]).sum(2)[..., : self.length])
        if len(self.rows[layer]) < self.interval:
            return alive
        votes = torch.stack(self.rows[layer]).sum(0)
        self.rows[layer] = []
        old = alive[..., : self.length]
        if old[0, 0].sum() <= self.tokens:
            return alive
        first = self.valid.int().argmax(-1)[:, None]
        column = torch.arange(self.length)
        sink = ((column >= first) & (column < first + self.sinks))[:, None]
        votes = votes.masked_fill(~self.valid[:, None], -1.0).masked_fill(~old, -2.0).masked_fill(sink, 1e3)
        kept = torch.zeros_like(old).scatter_(2, votes.topk(self.tokens).indices, True)
        return torch.cat([kept, alive[..., self.length :]], 2)


def test_generation_equals_the_masked_reference():
    method = {"method": "loopserve", "tokens": 20, "interval": 6, "sinks": 2}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 42, padding=(0, 7))
    reference = masked(eager, LoopRule(20, 6, 2))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


def test_worked_example():
    policy = LoopServePolicy(Budget(tokens=2), interval=2, sinks=0)
    rows = ([0.1, 0.4, 0.05, 0.25, 0.15, 0.05], [0.1, 0.1, 0.05, 0.55, 0.1, 0.1])
    state = {name: torch.zeros(1, 1, 8) for name in ("votes", "safe", "padding")}
    state["prompt"] = torch.tensor([[[1.0] * 6 + [0.0] * 2]])
    for count, row in enumerate(rows, 1):
        step = Step(torch.tensor([[row + [0.0] * count]]), 6 + count, 1, 1, count)
        live = {name: x[..., : 6 + count] for name, x in state.items()}
        policy.observe(live, step)
        kept = policy.evict(live, step, 2)
    assert kept.tolist() == [[[1, 3, 6, 7]]]
