"""StreamingLLM's cache against masks over eager attention, and the worked example of its specification."""

import torch
from torchaccel.passes.kv_compression.streaming_llm import StreamingLLMPolicy

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import prompt_of
from tests.passes.kv_compression.masked_reference import Rule, masked
from torchaccel.runtime.eviction import Budget, Step


class StreamingRule(Rule):
    """Columns are counted from the first real one of a row."""

    def __init__(self, sinks, recent, interval):
        self.sinks, self.recent, self.interval = sinks, recent, interval

    def cut(self, alive):
        tokens = alive.shape[2]
        column = torch.arange(tokens)
        first = self.valid.int().argmax(-1)[:, None, None]
        sink = (column >= first) & (column < first + self.sinks)
        return alive & (sink | (column >= tokens - self.recent))

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid = valid
        return self.cut(torch.ones(k.shape[:3], dtype=torch.bool))

    def step(self, layer, weights, alive):
        full = alive[0, 0].sum() >= self.sinks + self.recent + self.interval
        return self.cut(alive) if full else alive


def test_generation_equals_the_masked_reference():
    options = {"kv_compression": {"method": "streaming_llm", "tokens": 20, "sinks": 3, "interval": 5}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 42, padding=(0, 9))
    reference = masked(eager, StreamingRule(3, 17, 5))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]
    stored = [record.counter.kv_bytes for record in torchaccel.report(fast).records]
    assert stored[0] == stored[1]


def test_worked_example():
    policy = StreamingLLMPolicy(Budget(tokens=5), sinks=2, interval=1)
    first = prompt_of(torch.full((5, 5), 0.2).tril())
    kept = policy.keep(first)
    assert kept.tolist() == [[[0, 1, 2, 3, 4]]]
    state = {name: torch.nn.functional.pad(x, (0, 1)) for name, x in policy.state(first, kept).items()}
    # After one more token: the paper makes room before the step, here the step sees all and then the same one goes.
    assert policy.evict(state, Step(None, 6, 1, 1, 1), 5).tolist() == [[[0, 1, 3, 4, 5]]]
