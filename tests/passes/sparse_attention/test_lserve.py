"""LServe against a mask over eager attention, and the worked example of its specification."""

from types import SimpleNamespace

import pytest
import torch
from torchaccel.passes.sparse_attention.lserve import LServe, LServeOptions, ReusedPages
from transformers import DynamicCache

from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing
from torchaccel.calibration.identity import ModelIdentity
from torchaccel.calibration.plan import CalibrationPlan
from torchaccel.errors import OptionsError
from torchaccel.options import resolve
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


def chooser(**fields):
    policy = ReusedPages(
        **{"pages": 3, "part": 2, "interval": 4, "streaming": (False, True), "sinks": 4, "recent": 8} | fields
    )
    return policy, policy.allocate(Sizes(1, 2, 128, 8, torch.float32), torch.device("cpu"))


def steps(policy, state, end, count):
    """Lists of ``count`` steps behind ``end`` slots, of random keys and queries."""
    found = []
    for slot in range(end, end + count):
        call = Call(torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8), torch.tensor([0, slot, slot]))
        policy.append(state, call)
        found.append(policy.choose(state, call))
    return torch.cat(found)


def test_a_choice_serves_for_some_steps():
    policy, state = chooser(block=8)
    keys = torch.randn(1, 2, 60, 8)
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    found = steps(policy, state, 60, 9)
    retrieving, streaming = found.unbind(1)
    # Slots 60 .. 63 are of page 7, then page 8 begins; chosen at 60, 64 and 68.
    assert torch.equal(retrieving[:4], retrieving[:1].expand(4, -1)) and 7 in retrieving[0]
    assert 8 in retrieving[4] and torch.equal(retrieving[4:8], retrieving[4:5].expand(4, -1))
    assert all(len({*row[row >= 0].tolist()}) == 3 for row in retrieving)
    assert sorted(streaming[0].tolist()) == [-1, 0, 6, 7] and sorted(streaming[4].tolist()) == [-1, 0, 7, 8]


def test_a_page_that_is_begun_since_is_read():
    policy, state = chooser(block=8, streaming=(False, False))
    keys = torch.randn(1, 2, 62, 8)
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    found = steps(policy, state, 62, 4)
    assert found[:, :, -1].tolist() == [[-1, -1], [-1, -1], [8, 8], [8, 8]]
    assert torch.equal(found[:, :, :-1], found[:1, :, :-1].expand(4, -1, -1)) and (found[..., :-1] == 7).any(-1).all()


def test_crops_and_turns_choose_anew():
    policy, state = chooser(block=8)
    keys = torch.randn(1, 2, 60, 8)
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    steps(policy, state, 60, 1)
    assert state["made"].tolist() == [[61, 7]]
    policy.restore(state, lambda a, b: keys[:, :, a:b], 40, 40)
    assert state["made"].tolist() == [[0, 0]]
    assert int(steps(policy, state, 40, 2).max()) == 5 and state["made"].tolist() == [[41, 5]]
    policy.append(state, Call(keys[:, :, :3], keys[:, :, :3], torch.tensor([0, 42, 42])))
    assert state["made"].tolist() == [[0, 0]]


def test_padding_moves_the_sinks():
    """The first four tokens, behind 14 of padding, are in two pages."""
    policy, state = chooser(block=8)
    state["first"].fill_(14)
    keys = torch.randn(1, 2, 60, 8)
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    assert sorted(steps(policy, state, 60, 1)[0, 1].tolist()) == [1, 2, 6, 7]


def test_a_budget_that_covers_everything_is_exact():
    eager, fast = compiled("llama", options={"sparse_attention": METHOD | {"tokens": 512}})
    inputs = prompt(2, 123, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_turns_crops_and_plain_caches_equal_the_reference():
    eager, fast = compiled("llama", options={"sparse_attention": METHOD | HEADS, "strict": True})
    given = [DynamicCache(config=eager.config) for _ in range(2)]
    found = []
    rule = LServeRule(retrieving=HEADS["retrieval_heads"])
    with torch.no_grad():
        for cache in given:
            eager(prompt(2, 150)["input_ids"], past_key_values=cache, use_cache=True)
        for model, cache in zip((fast, listing(eager, rule)), given, strict=True):
            logits = []
            for seed, step in enumerate([1, 1, 1, 1, 9, 1, 1, -42, 1, 1]):
                if abs(step) > 1:
                    rule.made.clear()
                if step < 0:
                    cache.crop(step)
                    continue
                ids = prompt(2, step, seed=seed)["input_ids"]
                logits.append(model(ids, past_key_values=cache, use_cache=True).logits[:, -1])
            found.append(torch.stack(logits))
    torch.testing.assert_close(*found, atol=2e-4, rtol=0)


def test_int4_caches_read_the_listed_pages():
    """Everything is in the window of full precision still."""
    payload = {"kv_compression": {"method": "int4", "window": 256}, "strict": True}
    eager, fast = compiled("llama", options={"sparse_attention": METHOD, **payload})
    inputs = prompt(2, 150, padding=(0, 21))
    assert torch.equal(greedy(fast, inputs, 20), greedy(listing(eager, LServeRule()), inputs, 20))


def test_plans_of_duo_attention_say_which_heads():
    """Heads of the lowest gates are streaming ones, with the sinks that the gates were trained for."""
    tensors = {"site0.gates": torch.tensor([0.9, 0.1]), "site1.gates": torch.tensor([0.8, 0.7])}
    plan = CalibrationPlan("duo_attention", {"sinks": 6, "recent": 9}, ModelIdentity("Model", (), ()), tensors, "0.1.0")
    method = LServe(LServeOptions(plan=plan, sparsity=0.3))
    sites = [SimpleNamespace(index=i, layer=i, kv_heads=2, name=f"layers.{i}") for i in range(2)]
    assert [method.policy(site).streaming for site in sites] == [(False, True), (False, False)]
    assert (method.policy(sites[0]).sinks, method.policy(sites[0]).recent) == (6, 9)
    assert LServe(LServeOptions()).policy(sites[0]).streaming == (False, False)
    # A bundle may bring it, but takes back nothing that was said.
    for more, found in (({}, [plan]), ({"retrieval_heads": {0: [1]}}, [None])):
        asked = resolve({"sparse_attention": {"decode": {"method": "lserve", **more}}}).with_plans([plan])
        assert [(one.options.plan, one.phase) for one in asked.methods] == [(one, "decode") for one in found]


def test_options_are_checked():
    for wrong in ({"page": 16}, {"sinks": 4}, {"interval": 17}):
        with pytest.raises(OptionsError, match=next(iter(wrong))):
            resolve({"sparse_attention": {"method": "lserve"} | wrong})
