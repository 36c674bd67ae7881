"""DuoAttention against masks over eager attention; what streaming heads store does not grow."""

import pytest
import torch
from torchaccel.passes.kv_compression.duo_attention import DuoAttentionPolicy
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import prompt_of
from tests.passes.kv_compression.masked_reference import Rule, masked
from torchaccel.errors import EvictedTokensError
from torchaccel.runtime.eviction import HeadWindows

HEADS = {0: (1,), 2: (0, 1)}
SMALL = {"method": "duo_attention", "retrieval_heads": HEADS, "sinks": 3, "recent": 9}


class DuoRule(Rule):
    """A streaming head's query in column t sees the row's first real tokens and columns above t - recent."""

    def __init__(self, heads, sinks, recent):
        self.heads, self.sinks, self.recent = heads, sinks, recent

    def seen_by(self, layer, shape, query):
        alive = torch.ones(shape, dtype=torch.bool)
        column = torch.arange(shape[2])
        first = self.valid.int().argmax(-1)[:, None]
        near = (column > query - self.recent) | ((column >= first) & (column < first + self.sinks))
        for head in range(shape[1]):
            if head not in self.heads.get(layer, ()):
                alive[:, head] = near
        return alive

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid = valid
        return self.seen_by(layer, k.shape[:3], k.shape[2])

    def step(self, layer, weights, alive):
        self.valid = torch.nn.functional.pad(self.valid, (0, alive.shape[2] - self.valid.shape[1]), value=True)
        return self.seen_by(layer, alive.shape, alive.shape[2])


def duo(heads=HEADS, **options):
    return {"kv_compression": {**SMALL, "retrieval_heads": heads, **options}, "strict": True}


def test_generation_equals_the_masked_reference():
    eager, fast = compiled("llama", options=duo())
    inputs = prompt(2, 60, padding=(0, 7))
    plain = greedy(fast, inputs, 80)
    assert torch.equal(plain, greedy(masked(eager, DuoRule(HEADS, 3, 9)), inputs, 80))
    assert phases(fast) == ["prefill", "decode"]
    # A layer of retrieval heads is exact.
    layouts = [site.layout for site in torchaccel.report(fast).records[1].sites]
    assert layouts == ["dense DuoAttentionPolicy", "dense DuoAttentionPolicy", "dense"]


def test_proposed_tokens_are_taken_back():
    """Prompt lookup proposes tokens and crops the cache to those that were right: the result is that of greedy."""
    _, fast = compiled("llama", options=duo())
    inputs = prompt(1, 12)
    inputs = {name: x.repeat(1, 5) for name, x in inputs.items()}
    assert torch.equal(greedy(fast, inputs, 40, prompt_lookup_num_tokens=4), greedy(fast, inputs, 40))


def test_512_steps_compile_once_and_streaming_heads_do_not_grow():
    _, fast = compiled("llama", layers=2, options=duo({0: (1,)}))
    cache = DynamicCache(config=fast.config)
    token, sizes, lengths = prompt(1, 1)["input_ids"], [], []
    with torch.no_grad():
        fast(prompt(1, 100)["input_ids"], past_key_values=cache, use_cache=True)
        for _ in range(512):
            fast(token, past_key_values=cache, use_cache=True)
            sizes.append([layer.keys.physical.nbytes for layer in cache.layers])
            lengths.append(cache.get_seq_length())
    assert phases(fast) == ["prefill", "decode"] and lengths == list(range(101, 613))
    assert {size[1] for size in sizes} == {sizes[0][1]}
    token_bytes = cache.layers[0].keys.shape[3] * 4 + 4
    windows = 3 + 9 + HeadWindows.REWIND
    # Both heads with room for 32 tokens, or a sixteenth, and a page at most; tables aside.
    assert sizes[-1][1] < 2 * (windows + 64) * token_bytes + 100
    assert sizes[-1][0] < (windows + 612 + 2 * (32 + 32)) * token_bytes + 500
    for layer in cache.layers:
        with pytest.raises(EvictedTokensError, match="DuoAttentionPolicy"):
            layer.keys.dense()


def test_several_tokens_at_once_are_as_one_by_one():
    _, fast = compiled("llama", options=duo())
    first, turn = prompt(2, 60)["input_ids"], prompt(2, 200, seed=1)["input_ids"]
    results = []
    with torch.no_grad():
        for size in (1, 200):
            cache = DynamicCache(config=fast.config)
            fast(first, past_key_values=cache, use_cache=True)
            parts = [fast(part, past_key_values=cache, use_cache=True).logits for part in turn.split(size, 1)]
            results.append(torch.cat([*parts, fast(turn[:, :1], past_key_values=cache, use_cache=True).logits], 1))
            # A long turn leaves no more behind than its tokens one by one.
            assert cache.layers[1].keys.physical.segments.counts.max() <= 3 + 9 + 2 * 32
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=2e-4)


def test_windows_beyond_the_text_are_exact():
    eager, fast = compiled("llama", options=duo({}, sinks=0, recent=999))
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_what_stays_of_a_prompt():
    marks = torch.full((60, 60), 1 / 60).tril()
    first = prompt_of(marks)
    first.valid[0, :5] = False
    policy = DuoAttentionPolicy(HeadWindows((True,), 2, 3))
    kept = policy.kept(first)[0, 0].nonzero().flatten().tolist()
    assert kept == [5, 6, *range(60 - 3 - HeadWindows.REWIND, 60)]


def test_heads_that_do_not_exist_are_declined():
    _, fast = compiled("llama", options=duo({0: (7,)}))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"DeclinedError.*KV head 7 of 2"):
        greedy(fast, prompt(1, 20), 2)
