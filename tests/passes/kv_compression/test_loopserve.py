"""LoopServe's progressive compression against masks over eager attention."""

import copy
import dataclasses

import pytest
import torch
from torchaccel.passes.kv_compression.loopserve import LoopServePolicy
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import A6, prompt_of
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked
from torchaccel.errors import OptionsError
from torchaccel.options import resolve
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


class RestoringRule(LoopRule):
    def prompt(self, layer, q, k, v, weights, valid):
        self.scale = q.shape[-1] ** -0.5
        return super().prompt(layer, q, k, v, weights, valid)

    def asked(self, layer, q, k, v):
        q = grouped(q, k.shape[1])
        scores = (q @ k[:, :, None, : self.length].mT).float() * self.scale
        votes = scores.masked_fill(~self.valid[:, None, None, None], -torch.inf).softmax(-1).mean(2)
        self.rows[layer].append(votes)

    def step(self, layer, weights, alive):
        if len(self.rows[layer]) < self.interval:
            return alive
        votes = torch.cat(self.rows[layer], 2)[:, :, -self.interval :].sum(2)
        self.rows[layer] = []
        first = self.valid.int().argmax(-1)[:, None]
        column = torch.arange(self.length)
        sink = ((column >= first) & (column < first + self.sinks))[:, None]
        votes = votes.masked_fill(~self.valid[:, None], -1.0).masked_fill(sink, 1e3)
        old = torch.zeros_like(alive[..., : self.length]).scatter_(2, votes.topk(self.tokens).indices, True)
        self.came_back = getattr(self, "came_back", False) or bool((old & ~alive[..., : self.length]).any())
        return torch.cat([old, alive[..., self.length :]], 2)


RESTORING = {"method": "loopserve", "tokens": 20, "interval": 6, "sinks": 2, "restore": True}


def test_tokens_that_come_back_equal_the_masked_reference():
    eager, fast = compiled("llama", options={"kv_compression": RESTORING, "strict": True})
    inputs = prompt(2, 42, padding=(0, 7))
    rule = RestoringRule(20, 6, 2)
    assert torch.equal(greedy(fast, inputs, 40), greedy(masked(eager, rule), inputs, 40))
    assert rule.came_back
    assert phases(fast) == ["prefill", "decode"]


def test_what_is_set_aside_is_counted_and_the_rest_is_small():
    _, fast = compiled("llama", options={"kv_compression": RESTORING, "strict": True})
    greedy(fast, prompt(2, 1000), 8)
    decode = torchaccel.report(fast).records[1].counter
    whole = 2 * 3 * 2 * 2 * 1000 * 16 * 4  # keys and values, layers, rows, heads, tokens, head_dim, bytes
    assert decode.host_bytes == whole
    assert decode.kv_bytes - decode.host_bytes < 0.2 * whole


def go_on(fast, cache, ids):
    with torch.no_grad():
        return [fast(one[:, None], past_key_values=cache, use_cache=True).logits for one in ids.unbind(1)]


def test_queries_of_tokens_that_were_given_up_ask_no_more():
    _, fast = compiled("llama", options={"kv_compression": RESTORING, "strict": True})
    ids = prompt(1, 47)["input_ids"]
    asking = []
    for crop in (False, True):
        cache = DynamicCache()
        with torch.no_grad():
            fast(ids[:, :42], past_key_values=cache, use_cache=True)
        for token in ids[:, 42:].unbind(1):
            go_on(fast, cache, token[:, None])
            if crop:
                go_on(fast, cache, ids[:, :1])
                cache.crop(-1)
        asking.append(cache.layers[0].keys.physical.record.aside)
    # The last one goes when the cache is continued.
    assert torch.equal(asking[1].take(None, 1).queries, asking[0].queries)
    assert asking[0].queries.shape == (1, 4, 5, 16)


def test_copies_and_reordered_rows_continue_by_themselves():
    _, fast = compiled("llama", options={"kv_compression": RESTORING, "strict": True})
    ids = prompt(2, 60)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        fast(ids[:, :42], past_key_values=cache, use_cache=True)
    go_on(fast, cache, ids[:, 42:50])
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert swapped.layers[0].keys.physical.record.aside.prompt is cache.layers[0].keys.physical.record.aside.prompt
    expected, got = go_on(fast, cache, ids[:, 50:]), go_on(fast, swapped, ids.flip(0)[:, 50:])
    torch.testing.assert_close(torch.stack(got), torch.stack(expected).flip(1), atol=1e-5, rtol=1e-5)


def test_worked_example_with_the_whole_prompt():
    rows = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.15, 0.05], [0.1, 0.1, 0.05, 0.55, 0.1, 0.1]])
    policy = LoopServePolicy(Budget(tokens=2), interval=2, sinks=0, restore=True)
    asked = dataclasses.replace(prompt_of(A6), queries=rows.log()[None, None])
    torch.testing.assert_close(asked.later_attention().sum(2)[0, 0], torch.tensor([0.2, 0.5, 0.1, 0.8, 0.25, 0.15]))
    assert policy.recall(asked, Step(None, 8, 1, 1, 2), 2).tolist() == [[[1, 3]]]


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


def test_what_is_set_aside_may_lie_in_files(tmp_path):
    inputs, found = prompt(2, 60, padding=(0, 7)), []
    for more in ({}, {"offload": str(tmp_path)}):
        _, fast = compiled("llama", layers=1, options={"kv_compression": RESTORING | more, "strict": True})
        tokens = greedy(fast, inputs, 20)
        found.append((tokens, torchaccel.report(fast).records[-1].counter))
    assert torch.equal(found[0][0], found[1][0])
    memory, files = found[0][1], found[1][1]
    assert memory.host_bytes == files.file_bytes == 2 * 2 * 2 * 60 * 16 * 4
    assert memory.file_bytes == files.host_bytes == 0
    assert files.kv_bytes == memory.kv_bytes - memory.host_bytes
    with pytest.raises(OptionsError, match="ask for restore"):
        resolve({"kv_compression": RESTORING | {"restore": False, "offload": str(tmp_path)}})
