"""LServe against a mask over eager attention, and the worked example of its specification."""

import pytest
import torch
from torchaccel.passes.sparse_attention.lserve import ReusedPages

from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing
from torchaccel.runtime.selection import Call, Sizes

METHOD = {"method": "lserve", "tokens": 96, "page": 32, "part": 16, "interval": 3}
HEADS = {"retrieval_heads": {0: (0, 1), 1: (1,)}, "sinks": 20, "recent": 32}


class LServeRule(Lister):
    """From the specification, a row and a head at a time. retrieving: KV heads of each layer, None for all."""

    def __init__(self, pages=3, page=32, part=16, interval=3, retrieving=None, sinks=20, recent=32):
        self.pages, self.page, self.part, self.interval = pages, page, part, interval
        self.retrieving, self.sinks, self.recent = retrieving, sinks, recent
        self.made = {}

    def step(self, layer, q, k, valid):
        batch, kv_heads, tokens, _ = k.shape
        last = (tokens - 1) // self.page
        age, pages = self.made.get(layer, (0, {}))
        seen = torch.zeros(batch, kv_heads, tokens, dtype=torch.bool)
        for b, h in torch.ones(batch, kv_heads).nonzero().tolist():
            first = int(valid[b].int().argmax())
            if self.retrieving is not None and h not in self.retrieving.get(layer, ()):
                chosen = {*range(first // self.page, (first + self.sinks - 1) // self.page + 1)}
                chosen |= {*range(last - self.recent // self.page, last + 1)}
            else:
                if age % self.interval == 0:
                    scores = [
                        self.score(q[b].unflatten(0, (kv_heads, -1))[h, :, 0], k[b, h], valid[b], i)
                        for i in range(last)
                    ]
                    order = sorted(range(last), key=lambda i: -scores[i])
                    pages[b, h] = {*order[: self.pages - 1], last}
                chosen = pages[b, h] | {last}
            for i in chosen:
                seen[b, h, i * self.page : (i + 1) * self.page] = True
        self.made[layer] = age + 1, pages
        return seen

    def score(self, queries, keys, valid, page):
        """Of query heads together: the highest bound of a part of a page."""
        best = -torch.inf
        for begin in range(page * self.page, (page + 1) * self.page, self.part):
            real = keys[begin : begin + self.part][valid[begin : begin + self.part]]
            if len(real):
                bound = torch.maximum(queries * real.amax(0), queries * real.amin(0)).sum(-1).max()
                best = max(best, float(bound))
        return best


@pytest.mark.parametrize(("padding", "heads"), [((0, 0), {}), ((0, 45), HEADS)])
def test_generation_equals_the_masked_reference(padding, heads):
    eager, fast = compiled("llama", options={"sparse_attention": METHOD | heads, "strict": True})
    inputs = prompt(2, 170, padding=padding)
    exact = greedy(eager, inputs, 64)
    rule = LServeRule(retrieving=heads.get("retrieval_heads"))
    found = greedy(listing(eager, rule), inputs, 64)
    assert torch.equal(greedy(fast, inputs, 64), found) and not torch.equal(found, exact)
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)


def test_worked_example():
    """Parts of bounds 23 and 40 for the query of the publication: their page has 40."""
    q = torch.tensor([1.0, -2, 2, -2, 1, 1, 1, -3])[None, None, None]
    greatest = torch.tensor([[2.0, 3, 2, 8, 4, 5, 2, 6], [4, 6, 3, 4, 2, 4, 5, 7]])
    least = torch.tensor([[-6.0, -1, -6, 1, -5, -6, -6, -2], [0, -2, -8, -3, -8, -7, -3, -3]])
    # Three pages of two parts of two slots: one part alone scores 23, the other 40, and the last page is open.
    parts = [torch.stack([least[i], greatest[i]]) for i in (0, 0, 0, 1, 0)]
    keys = torch.cat(parts)[None, None]
    policy = ReusedPages(2, 2, 1, (False,), 0, 0, 4)
    state = policy.allocate(Sizes(1, 1, 16, 8, torch.float32), torch.device("cpu"))
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    listed = policy.choose(state, Call(q, keys[:, :, :1], torch.tensor([0, 9, 9])))
    assert listed.tolist() == [[[1, 2, -1]]]
