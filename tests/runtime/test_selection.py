"""The state of a policy that selects, through whatever happens to a cache: steps, turns, crops, beams, copies."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.listed_reference import listing
from tests.passes.sparse_attention.test_quest import QuestRule
from torchaccel.errors import EvictedTokensError
from torchaccel.runtime.selection import Call, Selection, Sizes, copied
from torchaccel.runtime.summaries import SummarySelection

QUEST = {"sparse_attention": {"method": "quest", "tokens": 48, "dense_layers": 0}}


def both(**arguments):
    eager, fast = compiled("llama", options=QUEST | arguments)
    return listing(eager, QuestRule(3, 16)), fast


def turns(model, steps):
    """Logits of the last token of each call; a negative number crops the cache by so many tokens first."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for seed, step in enumerate(steps):
            if step < 0:
                cache.crop(step)
            else:
                ids = prompt(2, step, seed=seed)["input_ids"]
                found.append(model(ids, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found), cache


def test_turns_and_crops_equal_the_reference():
    reference, fast = both()
    # A prompt, steps, a turn of several tokens, steps, a crop into an older block, steps over the end of a block.
    steps = [101, 1, 1, 30, 1, 1, 1, -43, 1, 1, *[1] * 20, -3, 7, 1, 1]
    expected, _ = turns(reference, steps)
    found, cache = turns(fast, steps)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert set(phases(fast)) == {"prefill", "extend", "decode"} and len(phases(fast)) == 3
    own = cache.layers[0].keys
    storage = own.physical
    fresh = storage.layout.selection.allocate(storage.sizes, torch.device("cpu"))
    keys = own.dense()
    storage.layout.selection.append(fresh, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    rows = -(-own.shape[2] // 16)
    assert torch.equal(storage.state["summary"][:, :, :rows], fresh["summary"][:, :, :rows])


def test_beams_equal_the_reference():
    reference, fast = both()
    inputs = prompt(2, 90, padding=(0, 17))
    assert torch.equal(greedy(fast, inputs, 24, num_beams=3), greedy(reference, inputs, 24, num_beams=3))
    assert phases(fast) == ["prefill", "decode"]


def test_prompts_in_chunks_equal_the_reference():
    """The first chunk of the second row is nothing but padding."""
    reference, fast = both()
    inputs = prompt(2, 120, padding=(0, 41))
    chunked = greedy(fast, inputs, 24, prefill_chunk_size=32)
    assert torch.equal(chunked, greedy(reference, inputs, 24))


def test_512_steps_are_two_graphs():
    _, fast = compiled("llama", options=QUEST)
    greedy(fast, prompt(1, 60), 520, eos_token_id=None)
    assert phases(fast) == ["prefill", "decode"]


def test_copies_are_independent_and_the_start_stays():
    _, fast = both()
    found = []
    with torch.no_grad():
        cache = DynamicCache(config=fast.config)
        fast(prompt(1, 100)["input_ids"], past_key_values=cache, use_cache=True)
        for own in (copy.deepcopy(cache), cache):
            for seed in range(20):
                out = fast(prompt(1, 1, seed=seed)["input_ids"], past_key_values=own)
            found.append(out.logits)
    assert torch.equal(*found)
    with pytest.raises(EvictedTokensError, match="SummarySelection"):
        _ = cache.layers[0].keys[:, :, 5:]


def test_what_was_overwritten_is_made_anew():
    """An older view that is continued after a longer one was cropped and continued otherwise."""
    _, fast = both()
    with torch.no_grad():
        cache = DynamicCache(config=fast.config)
        fast(prompt(1, 100)["input_ids"], past_key_values=cache, use_cache=True)
        older = copy.copy(cache)
        older.layers = [copy.copy(layer) for layer in cache.layers]
        cache.crop(-30)
        for seed in range(40):
            fast(prompt(1, 1, seed=seed)["input_ids"], past_key_values=cache)
        fast(prompt(1, 1)["input_ids"], past_key_values=older)
    own = older.layers[0].keys
    keys, policy = own.dense(), own.physical.layout.selection
    fresh = policy.allocate(own.physical.sizes, torch.device("cpu"))
    policy.append(fresh, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    assert torch.equal(own.physical.state["summary"][:, :, :7], fresh["summary"][:, :, :7])


def test_quantised_caches_keep_summaries_of_what_came_in():
    options = QUEST | {"kv_compression": {"method": "int4", "window": 256}, "strict": True}
    reference, fast = both(**options)
    inputs = prompt(2, 123, padding=(0, 21))
    # Everything is in the window of full precision still.
    assert torch.equal(greedy(fast, inputs, 30), greedy(reference, inputs, 30))


def test_policies_are_found_again_by_their_keys():
    policy = SummarySelection("mean", 7, 32, 1, 2, "softmax")
    assert Selection.from_key(policy.key()) == policy


def test_rows_and_sizes_of_a_state_change():
    policy = SummarySelection("minmax", 3, 16)
    state = policy.allocate(Sizes(2, 3, 64, 8, torch.float32), torch.device("cpu"))
    for x in state.values():
        x.copy_(torch.randn(x.shape) * 10)
    grown = copied(policy, state, Sizes(3, 3, 128, 8, torch.float32), torch.tensor([1, 0, 1]))
    assert torch.equal(grown["summary"][:, :, :5], state["summary"][[1, 0, 1]])
    assert not grown["summary"][:, :, 5:].any() and torch.equal(grown["first"], state["first"][[1, 0, 1]])
