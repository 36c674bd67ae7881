"""Recycled Attention against a mask over eager attention, and the worked example of its specification."""

import pytest
import torch
from transformers import DynamicCache

from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing
from tests.runtime.test_adoption import continued, plain_cache
from torchaccel.errors import OptionsError
from torchaccel.options import resolve
from torchaccel.runtime.recycling import RecycledSelection
from torchaccel.runtime.selection import Selection, Sizes, copied

TOKENS, STRIDE = 24, 7


class RecycleRule(Lister):
    """Lists of plain numbers for every layer, row and KV head; anything but the next step begins with a full one."""

    def __init__(self, tokens, stride, check=0, similarity=0.0):
        self.tokens, self.stride, self.check, self.similarity = tokens, stride, check, similarity
        self.lists, self.steps, self.last, self.asked, self.full = {}, {}, {}, {}, []

    def step(self, layer, q, k, valid):
        batch, kv_heads, stored, _ = k.shape
        if self.last.get(layer) != stored - 1 or stored <= self.tokens:
            self.steps[layer] = 0
        self.last[layer], self.group = stored, q.shape[1] // kv_heads
        full = self.steps[layer] in (0, self.stride)
        if not full and self.check and self.steps[layer] % self.check == 0:
            alike = torch.cosine_similarity(q[:, :, 0], self.asked[layer], dim=-1)
            full = min(row.mean() for row in alike) < self.similarity
        self.full.append(bool(full))
        if full:
            self.asked[layer] = q[:, :, 0]
            return torch.ones(batch, kv_heads, stored, dtype=torch.bool)
        chosen = torch.zeros(batch, kv_heads, stored, dtype=torch.bool)
        for b, h in torch.ones(batch, kv_heads).nonzero().tolist():
            chosen[b, h, self.lists[layer][b, h]] = True
        return chosen

    def attended(self, layer, weights):
        stored, mass = weights.shape[2], weights.unflatten(1, (-1, self.group)).sum(2)
        if stored <= self.tokens:
            return
        if self.full[-1]:
            self.lists[layer], self.steps[layer] = {}, 0
        for b, h in torch.ones(mass.shape[:2]).nonzero().tolist():
            own, row = self.lists[layer].get((b, h)), mass[b, h].tolist()
            if own is None:
                self.lists[layer][b, h] = sorted(range(stored), key=lambda slot: -row[slot])[: self.tokens]
            else:
                self.lists[layer][b, h] = sorted([*own, stored - 1], key=lambda slot: -row[slot])[: self.tokens]
        self.steps[layer] += 1


def method(**more):
    return {"method": "recycled_attention", "tokens": TOKENS, "stride": STRIDE, **more}


@pytest.mark.parametrize(("padding", "trigger"), [((0, 0), ()), ((0, 21), ()), ((0, 21), (3, 0.6))])
def test_generation_equals_the_masked_reference(padding, trigger):
    more = dict(zip(("check", "similarity"), trigger, strict=False))
    options = method(**(more | {"schedule": "similarity", "stride": 1000} if trigger else {}))
    eager, fast = compiled("llama", options={"sparse_attention": options, "strict": True})
    inputs, rule = prompt(2, 123, padding=padding), RecycleRule(TOKENS, options["stride"], *trigger)
    exact = greedy(eager, inputs, 64)
    found = greedy(listing(eager, rule), inputs, 64)
    assert torch.equal(greedy(fast, inputs, 64), found) and not torch.equal(found, exact)
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)
    layers = eager.config.num_hidden_layers
    # With the trigger, layers decide by themselves, and not all steps do the same.
    assert layers < sum(rule.full) < len(rule.full)


@pytest.mark.parametrize("more", [{"stride": 1}, {"tokens": 512}])
def test_what_reads_everything_is_exact(more):
    eager, fast = compiled("llama", options={"sparse_attention": method(**more)})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 20), greedy(eager, inputs, 20))


def test_turns_and_crops_equal_the_reference():
    eager, fast = compiled("llama", options={"sparse_attention": method()})

    def turns(model):
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            for seed, step in enumerate([101, *[1] * 10, 30, 1, 1, -43, *[1] * 9, -3, 7, 1, 1]):
                if step < 0:
                    cache.crop(step)
                else:
                    ids = prompt(2, step, seed=seed)["input_ids"]
                    found.append(model(ids, past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.stack(found)

    own = turns(fast)
    torch.testing.assert_close(own, turns(listing(eager, RecycleRule(TOKENS, STRIDE))), atol=2e-4, rtol=0)
    assert len(phases(fast)) == 3


def test_plain_caches_are_continued():
    eager, fast = compiled("llama", options={"sparse_attention": method(), "strict": True})
    inputs = prompt(2, 123, padding=(0, 42))
    given = [plain_cache(eager, inputs) for _ in range(2)]
    expected, _ = continued(listing(eager, RecycleRule(TOKENS, STRIDE)), inputs, given[0], [1] * 20)
    found, _ = continued(fast, inputs, given[1], [1] * 20)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert all_lowered(fast)


def test_quantised_caches_are_recycled():
    """Codes round what is read, so that tokens may differ once."""
    options = {"sparse_attention": method(), "kv_compression": "int8", "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 123, padding=(0, 21))
    found, expected = (greedy(m, inputs, 12) for m in (fast, listing(eager, RecycleRule(TOKENS, STRIDE))))
    assert all_lowered(fast) and torch.equal(found[:, : 123 + 8], expected[:, : 123 + 8])


def state_of(policy, batch=1, heads=1, dim=4):
    return policy.allocate(Sizes(batch, heads, 16, dim, torch.float32), torch.device("cpu"))


def test_worked_example():
    """(.1, .5, .1, .3) lists {1, 3}; then 4 takes the place of 1, and 5 that of 4."""
    policy = RecycledSelection(2, 50, 1)
    state, q = state_of(policy), torch.randn(1, 1, 1, 4)

    def mass(**slots):
        out = torch.full((1, 1, 16), torch.nan)
        out[..., :6] = 0.0
        for slot, x in slots.items():
            out[..., int(slot[1:])] = x
        return out

    assert policy.full(state, q)
    policy.learn(state, q, mass(s0=0.1, s1=0.5, s2=0.1, s3=0.3), 4)
    assert sorted(state["recycled"].flatten().tolist()) == [1, 3] and not policy.full(state, q)
    policy.renew(state, mass(s1=0.2, s3=0.5, s4=0.3), 5)
    assert sorted(state["recycled"].flatten().tolist()) == [3, 4]
    policy.renew(state, mass(s3=0.6, s4=0.1, s5=0.3), 6)
    assert sorted(state["recycled"].flatten().tolist()) == [3, 5]
    policy.renew(state, mass(s3=0.6, s5=0.3, s6=0.1), 7)
    assert sorted(state["recycled"].flatten().tolist()) == [3, 5]
    policy.restore(state, lambda lo, hi: q, 5, 5)
    assert policy.full(state, q)


def test_queries_that_turn_away_ask_for_a_full_step():
    policy = RecycledSelection(2, 50, 2, 2, 0.5)
    assert Selection.from_key(policy.key()) == policy
    state = state_of(policy, 2, 3)
    q = torch.randn(2, 6, 1, 4)
    policy.learn(state, q, torch.rand(2, 3, 16), 9)
    turned = q.clone()
    turned[1, :4] *= -1
    for steps, expected in ((1, False), (2, True), (3, False), (4, True)):
        state["steps"].fill_(steps)
        assert policy.full(state, turned) is expected and not policy.full(state, 3 * q)
    state["steps"].fill_(2)
    # The mean over its heads is 1/3 for the second row, and 1 for the first one.
    assert not RecycledSelection(2, 50, 2, 2, -0.5).full(state, turned)
    beams = copied(policy, state, Sizes(3, 3, 64, 4, torch.float32), torch.tensor([1, 1, 0]))
    assert torch.equal(beams["recycled"], state["recycled"][[1, 1, 0]]) and beams["steps"].tolist() == [2] * 3
    # What decides what runs is never waited for.
    elsewhere = policy.allocate(Sizes(2, 3, 64, 4, torch.float32), torch.device("meta"))
    assert {name for name, x in elsewhere.items() if x.device.type == "cpu"} == {"steps"}


def test_options_are_checked():
    for wrong in ({"stride": 0}, {"tokens": 0}, {"schedule": "never"}, {"similarity": 2}, {"check": 5}):
        with pytest.raises(OptionsError, match=next(iter(wrong))):
            resolve({"sparse_attention": {"method": "recycled_attention", **wrong}})
