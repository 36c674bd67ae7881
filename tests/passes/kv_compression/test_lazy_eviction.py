"""LazyEviction against masks over eager attention, and the worked examples of its specification."""

import pytest
import torch
from torchaccel.passes.kv_compression.lazy_eviction import LazyEvictionPolicy, importance

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked
from torchaccel.runtime.eviction import Budget, Step


class LazyRule(Rule):
    """Token by token, as the paper tells it."""

    def __init__(self, tokens, window, threshold, sinks):
        self.tokens, self.window, self.threshold, self.sinks = tokens, window, threshold, sinks
        self.time, self.memory = {}, {}

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid = valid
        self.time[layer] = 0
        self.memory[layer] = [torch.zeros(k.shape[:3]), torch.zeros(k.shape[:3])]
        return torch.ones(k.shape[:3], dtype=torch.bool)

    def step(self, layer, weights, alive):
        self.time[layer] += 1
        t = self.time[layer]
        last, recurrence = (torch.nn.functional.pad(x, (0, 1)) for x in self.memory[layer])
        last[..., -1] = t - 1
        active = grouped(weights[:, :, -1], alive.shape[1]).mean(2) >= self.threshold
        recurrence = torch.where(active, torch.maximum(recurrence, t - last), recurrence)
        last = torch.where(active, torch.full_like(last, t), last)
        self.memory[layer] = [last, recurrence]
        if t % self.window or alive[0, 0].sum() <= self.tokens:
            return alive
        keep = torch.zeros_like(alive)
        for b, h in torch.ones(alive.shape[:2]).nonzero().tolist():
            living = alive[b, h].nonzero().flatten()
            first = int(self.valid[b].int().argmax())
            scores = []
            for i in living.tolist():
                ts, mri = float(last[b, h, i]), float(recurrence[b, h, i])
                h1 = (0.0 if t > ts else 1.0) if mri == 0 else 2 / (1 + torch.tensor((t - ts) / mri).exp().item())
                h2 = 0.0 if mri == 0 else 2 / (1 + torch.tensor(mri - 1).exp().item())
                score = h1 + h2
                if i < first:
                    score = -1.0
                if first <= i < first + self.sinks:
                    score = 1e3
                scores.append(score)
            scores = torch.tensor(scores)
            scores[-self.window :] = 1e4
            keep[b, h, living[scores.sort(descending=True, stable=True).indices[: self.tokens]]] = True
        return keep


def test_generation_equals_the_masked_reference():
    method = {"method": "lazy_eviction", "tokens": 24, "window": 8, "threshold": 0.03, "sinks": 2}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 42, padding=(0, 7))
    reference = masked(eager, LazyRule(24, 8, 0.03, 2))
    # Many tokens are equally important: of those the earlier ones stay.
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("last", "recurrence", "paper", "code"),
    [(10, 1, 2.0, 1.5379), (8, 3, 0.9169, 0.5561), (4, 3, 0.4768, 0.3333), (1, 9, 0.5386, 0.2391), (1, 0, 0.0, 0.0)],
)
def test_importance_of_the_specification(last, recurrence, paper, code):
    given = torch.tensor(float(last)), torch.tensor(float(recurrence))
    assert importance(10, *given, "paper").item() == pytest.approx(paper, abs=1e-4)
    if recurrence:
        assert importance(10, *given, "code").item() == pytest.approx(code, abs=1e-4)


def test_trace_of_the_specification():
    policy = LazyEvictionPolicy(Budget(tokens=99), threshold=0.1)
    names = ("last", "recurrence", "safe", "padding")
    state = {name: torch.zeros(1, 1, 6) for name in names}
    for t, weight in enumerate((0.5, 0.05, 0.05, 0.2, 0.05), 1):
        mass = torch.tensor([[[weight] + [0.0] * t]])
        policy.observe({name: x[..., : t + 1] for name, x in state.items()}, Step(mass, t + 1, 1, 1, t))
    assert state["last"][0, 0, 0] == 4 and state["recurrence"][0, 0, 0] == 3
