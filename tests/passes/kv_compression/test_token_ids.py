"""Policies are shown the ids of the prompt's tokens and of the new ones, also behind token pruning."""

from dataclasses import dataclass, field

import pytest
import torch
from torchaccel.passes.kv_compression.h2o import H2O, H2OPolicy

from tests.e2e.generation import compiled, greedy, prompt
from torchaccel.runtime.eviction import Budget


@dataclass(frozen=True)
class Watcher(H2OPolicy):
    """Writes down the ids it is shown, with the columns that the layer has."""

    token_ids: bool = True
    seen: dict = field(default_factory=dict, hash=False, compare=False)

    def keep(self, prompt):
        self.seen.setdefault("prompt", []).append(prompt.ids)
        return super().keep(prompt)

    def evict(self, state, step, capacity):
        self.seen.setdefault("steps", []).append(step.ids)
        return super().evict(state, step, capacity)


@pytest.mark.parametrize("pruning", [None, {"method": "fastv", "layer": 1, "keep": 0.5}])
def test_ids_of_the_prompt_and_of_new_tokens(monkeypatch, pruning):
    watcher = Watcher(Budget(tokens=12), interval=4)
    monkeypatch.setattr(H2O, "policy", lambda self: watcher)
    options = {"kv_compression": "h2o", "strict": True} | ({"token_pruning": pruning} if pruning else {})
    _, fast = compiled("llama", options=options)
    inputs = prompt(2, 42, padding=(0, 7))
    made = greedy(fast, inputs, 5)
    whole, *later = watcher.seen["prompt"]
    assert torch.equal(whole, inputs["input_ids"]) and len(later) == 2
    if pruning:
        assert all(ids.shape[1] < 42 for ids in later) and torch.equal(later[0][:, -1], inputs["input_ids"][:, -1])
        for ids, row in zip(later[0], inputs["input_ids"], strict=True):
            assert all(token in row for token in ids)
    shown = watcher.seen["steps"]
    assert len(shown) == 12 and all(torch.equal(x, made[:, 42 + i // 3, None]) for i, x in enumerate(shown))


def test_without_ids_the_method_says_so(monkeypatch):
    monkeypatch.setattr(H2O, "policy", lambda self: Watcher(Budget(tokens=12)))
    _, fast = compiled("llama", options={"kv_compression": "h2o", "strict": True})
    with pytest.raises(Exception, match="ids of the tokens are not known"), torch.no_grad():
        fast(inputs_embeds=torch.randn(1, 9, 64), use_cache=True)
