"""Quest against a mask over eager attention, and the worked example of its specification."""

import pytest
import torch

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing, numbered
from torchaccel.runtime.selection import Call, Sizes
from torchaccel.runtime.summaries import SummarySelection


class QuestRule(Lister):
    """Bounds of every page in plain numbers, token by token."""

    def __init__(self, pages, page, dense_layers=0):
        self.pages, self.page, self.dense_layers = pages, page, dense_layers

    def step(self, layer, q, k, valid):
        batch, kv_heads, tokens, _ = k.shape
        chosen = torch.ones(batch, kv_heads, tokens, dtype=torch.bool)
        if layer < self.dense_layers:
            return chosen
        for b, h in torch.ones(batch, kv_heads).nonzero().tolist():
            queries = q[b].unflatten(0, (kv_heads, -1))[h, :, 0]
            bounds = []
            for begin in range(0, tokens, self.page):
                real = k[b, h, begin : begin + self.page][valid[b, begin : begin + self.page]]
                bound = torch.maximum(queries * real.amax(0), queries * real.amin(0)).sum(-1) if len(real) else None
                bounds.append(-torch.inf if bound is None else float(bound.max()))
            bounds[-1] = torch.inf
            best = torch.tensor(bounds).sort(descending=True, stable=True).indices[: self.pages]
            chosen[b, h] = numbered(best, self.page, tokens)
        return chosen


@pytest.mark.parametrize("padding", [(0, 0), (0, 21)])
def test_generation_equals_the_masked_reference(padding):
    method = {"method": "quest", "tokens": 64, "dense_layers": 1}
    eager, fast = compiled("llama", options={"sparse_attention": method, "strict": True})
    inputs = prompt(2, 123, padding=padding)
    exact = greedy(eager, inputs, 40)
    found = greedy(listing(eager, QuestRule(4, 16, 1)), inputs, 40)
    assert torch.equal(greedy(fast, inputs, 40), found) and not torch.equal(found, exact)
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)


def test_a_budget_that_covers_everything_is_exact():
    eager, fast = compiled("llama", options={"sparse_attention": {"method": "quest", "tokens": 512, "dense_layers": 0}})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_worked_example():
    """Bounds (4, 1, 7, 2) for q = (1, -2), in pages of two tokens."""
    keys = torch.tensor([(0, 1), (2, -1), (1, 3), (-1, 0), (3, 2), (0, -2), (1, 1), (4, 4)]).float()[None, None]
    policy = SummarySelection("minmax", 2, 2, recent=0)
    state = policy.allocate(Sizes(1, 1, 8, 2, torch.float32), torch.device("cpu"))
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    assert state["summary"][0, 0, :4].tolist() == [
        [[0, -1], [2, 1]], [[-1, 0], [1, 3]], [[0, -2], [3, 2]], [[1, 1], [4, 4]],
    ]  # fmt: skip
    q, none = torch.tensor([1.0, -2.0])[None, None, None], keys[:, :, :0]
    assert policy.choose(state, Call(q, none, torch.tensor([0, 8, 8]))).tolist() == [[[0, 2]]]


def test_options_are_checked():
    with pytest.raises(torchaccel.errors.OptionsError, match="page"):
        torchaccel.options.resolve({"sparse_attention": {"method": "quest", "page": 7}})
