"""MPCache against a mask over eager attention, and the worked examples of its specification."""

import pytest
import torch
from torchaccel.passes.kv_compression.mpcache import ClusterSelection, hierarchy

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing
from torchaccel.runtime.selection import Call, Sizes


class MPCacheRule(Lister):
    """From the specification, a row and a head at a time. layers: those that are treated, in order."""

    def __init__(self, tokens, layers, share=2, looks=0.2, coarse=0.5, fine=0.2, alpha=0.6):
        self.tokens, self.layers, self.share, self.looks = tokens, layers, share, looks
        self.ratios, self.alpha = ((32, coarse), (16, fine)), alpha
        self.kept, self.chosen = {}, {}

    def leader(self, layer):
        place = self.layers.index(layer)
        return self.layers[place - place % self.share]

    def prompt(self, layer, q, k, weights, valid):
        if layer not in self.layers or self.leader(layer) != layer:
            return
        batch, kv_heads, total, _ = k.shape
        columns = torch.empty(batch, kv_heads, min(self.tokens, total), dtype=torch.long)
        for b in range(batch):
            rows = max(1, int(valid[b].sum() * self.looks))
            seen = torch.ones(total, total).tril()[-rows:].sum(0)
            votes = weights[b, :, -rows:].sum(1).unflatten(0, (kv_heads, -1)).mean(1) / seen
            votes = votes.masked_fill(~valid[b], -1)
            columns[b] = votes.sort(dim=-1, descending=True, stable=True).indices[:, : self.tokens].sort(-1).values
        self.kept[layer] = columns

    def step(self, layer, q, k, valid):
        if layer not in self.layers:
            return torch.ones(k.shape[:3], dtype=torch.bool)
        if self.leader(layer) == layer:
            self.chosen[layer] = torch.zeros(k.shape[:3], dtype=torch.bool)
            for b, h in torch.ones(k.shape[:2]).nonzero().tolist():
                columns = self.kept[layer][b, h]
                generated = torch.arange(self.total, k.shape[2])
                columns = torch.cat([columns, generated])
                query = q[b].unflatten(0, (k.shape[1], -1))[h, :, 0].mean(0)
                self.chosen[layer][b, h, columns[self.clusters(query, k[b, h, columns], valid[b, columns])]] = True
        return self.chosen[self.leader(layer)].clone()

    def clusters(self, query, keys, real):
        """Slots that are read."""
        slots = len(keys)
        allowed = None
        for size, ratio in self.ratios:
            scores = []
            for begin in range(0, slots, size):
                own = keys[begin : begin + size][real[begin : begin + size]]
                if not len(own) or (allowed is not None and begin // (2 * size) not in allowed):
                    scores.append(None if len(own) else "dead")
                    continue
                scores.append(float(query @ (self.alpha * own.amax(0) + (1 - self.alpha) * own.amin(0))))
            live = [i for i, score in enumerate(scores) if score != "dead"]
            able = [i for i in live if scores[i] is not None]
            allowed = sorted(able, key=lambda i: -scores[i])[: int(len(live) * ratio)]
            size_of = size
        allowed = {*allowed, live[0], live[-1]}
        return torch.tensor([slot for slot in range(slots) if slot // size_of in allowed])


@pytest.mark.parametrize(("padding", "share"), [((0, 45), 2), ((0, 7), 1)])
def test_generation_equals_the_masked_reference(padding, share):
    method = {"method": "mpcache", "tokens": 200, "dense_layers": 1, "share": share}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 300, padding=padding)
    exact = greedy(eager, inputs, 30)
    rule = MPCacheRule(200, [1, 2], share)
    rule.total = 300
    found = greedy(listing(eager, rule), inputs, 30)
    assert torch.equal(greedy(fast, inputs, 30), found) and not torch.equal(found, exact)
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)


def test_everything_kept_and_read_is_exact():
    method = {"method": "mpcache", "ratio": 1.0, "coarse": 1.0, "fine": 1.0, "dense_layers": 0}
    eager, fast = compiled("llama", options={"kv_compression": method})
    inputs = prompt(2, 123, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_hierarchy_of_the_specification():
    keys = torch.tensor([(1, 0), (0, 1), (2, 1), (1, 2), (-1, 0), (0, -1), (3, 0), (0, 3)]).float()
    q = torch.tensor([1.0, 0.5])

    def level(size):
        parts = keys.unflatten(0, (-1, size))
        return (0.6 * parts.amax(1) + 0.4 * parts.amin(1)) @ q

    torch.testing.assert_close(level(4), torch.tensor([1.8, 2.1]))
    torch.testing.assert_close(level(2), torch.tensor([0.9, 2.4, -0.6, 2.7]))
    one = torch.tensor([1])
    assert hierarchy(level(4)[None, None], level(2)[None, None], one, one).tolist() == [[[False, False, False, True]]]


def test_similarity_of_the_specification():
    """q = (1, -2) over maxima (3, 1) and minima (-1, -4) is 3.4."""
    from torchaccel.passes.kv_compression.mpcache import _scores

    policy = ClusterSelection(500, 200, 0.6)
    state = policy.allocate(Sizes(1, 1, 64, 2, torch.float32), torch.device("cpu"))
    keys = torch.tensor([(3.0, -4.0), (-1.0, 1.0)])[None, None]
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    q = torch.tensor([0.4, -0.8, 0.6, -1.2])[None, None, None]
    scores = _scores(q, state["fine"], torch.tensor([0, 2, 2]), state["first"], 1, 16, "float32")
    torch.testing.assert_close(scores, torch.tensor([[[3.4]]]))


def test_options_are_checked():
    with pytest.raises(torchaccel.errors.OptionsError, match="fine"):
        torchaccel.options.resolve({"kv_compression": {"method": "mpcache", "fine": 0.0}})
