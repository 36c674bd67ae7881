"""Plain caches that are continued by methods that choose what steps read: their state is made when they come in."""

import pytest
import torch
from transformers import DynamicCache

from tests.e2e.generation import all_lowered, compiled, phases, prompt
from tests.passes.kv_compression.test_mpcache import MPCacheRule
from tests.passes.listed_reference import listing
from tests.passes.sparse_attention.test_infllm_v2 import OPTIONS as INFLLM
from tests.passes.sparse_attention.test_infllm_v2 import Rule as InfLLMRule
from tests.passes.sparse_attention.test_quest import QuestRule
from torchaccel.runtime.kv import LogicalKV

QUEST = {"method": "quest", "tokens": 48, "dense_layers": 0}


def plain_cache(model, inputs):
    """A cache of plain tensors that an eager model made of a prompt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def continued(model, inputs, cache, turns):
    """Logits of the last token of each turn, whose mask has the prompt's padding; and the cache."""
    mask, found = inputs["attention_mask"], []
    with torch.no_grad():
        for seed, n in enumerate(turns):
            mask = torch.nn.functional.pad(mask, (0, n), value=1)
            ids = prompt(mask.shape[0], n, seed=seed)["input_ids"]
            out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found), cache


@pytest.mark.parametrize(
    ("method", "rule", "tokens", "turns"),
    [
        (QUEST, lambda: QuestRule(3, 16), 123, [1] * 20),
        (QUEST, lambda: QuestRule(3, 16), 123, [5, 1, 1, 1]),
        (INFLLM, InfLLMRule, 401, [1] * 4),
    ],
)
def test_steps_equal_the_reference(method, rule, tokens, turns):
    eager, fast = compiled("llama", options={"sparse_attention": method, "strict": True})
    inputs = prompt(2, tokens, padding=(0, 42))
    given = [plain_cache(eager, inputs) for _ in range(2)]
    exact, _ = continued(eager, inputs, plain_cache(eager, inputs), turns)
    expected, _ = continued(listing(eager, rule()), inputs, given[0], turns)
    found, cache = continued(fast, inputs, given[1], turns)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert (found - exact).abs().max() > 0.01 and all_lowered(fast)
    assert all(isinstance(layer.keys, LogicalKV) for layer in cache.layers)


def test_the_state_is_that_of_a_compiled_prompt():
    _, fast = compiled("llama", options={"sparse_attention": QUEST})
    inputs = prompt(2, 123, padding=(21, 0))
    made = DynamicCache(config=fast.config)
    with torch.no_grad():
        fast(**inputs, past_key_values=made, use_cache=True)
    given = DynamicCache(config=fast.config)
    for index, layer in enumerate(made.layers):
        given.update(layer.keys.dense().clone(), layer.values.dense().clone(), index)
    expected, _ = continued(fast, inputs, made, [1, 1])
    found, _ = continued(fast, inputs, given, [1, 1])
    assert torch.equal(found, expected)
    for ours, theirs in zip(given.layers, made.layers, strict=True):
        own, other = ours.keys.physical.state, theirs.keys.physical.state
        assert torch.equal(own["first"], other["first"]) and own["first"].tolist() == [21, 0]
        assert torch.equal(own["summary"][1, :, :8], other["summary"][1, :, :8])


def test_caches_of_several_lengths_and_files(tmp_path):
    """A budget that covers everything is exact, and later lengths need no graph each."""
    method = QUEST | {"tokens": 512, "offload": str(tmp_path)}
    eager, fast = compiled("llama", options={"sparse_attention": method, "strict": True})
    for length in (42, 70, 123, 200):
        inputs = prompt(1, length)
        expected, _ = continued(eager, inputs, plain_cache(eager, inputs), [1, 1, 1])
        found, cache = continued(fast, inputs, plain_cache(eager, inputs), [1, 1, 1])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert cache.layers[0].keys.physical.mapping is not None
    assert phases(fast).count("decode") <= 4


def test_layers_that_share_lists_take_those_of_their_leader():
    """Nothing was evicted from a plain cache, which is said; lists are made all the same."""
    method = {"method": "mpcache", "dense_layers": 0, "share": 2}
    eager, fast = compiled("llama", options={"kv_compression": method})
    inputs = prompt(2, 300, padding=(0, 45))
    given = [plain_cache(eager, inputs) for _ in range(2)]
    exact, _ = continued(eager, inputs, plain_cache(eager, inputs), [1] * 4)
    rule = MPCacheRule(300, [0, 1, 2])
    rule.total, rule.kept = 300, {layer: torch.arange(300).expand(2, 8, -1) for layer in (0, 2)}
    expected, _ = continued(listing(eager, rule), inputs, given[0], [1] * 4)
    with pytest.warns(UserWarning, match="made without this method"):
        found, _ = continued(fast, inputs, given[1], [1] * 4)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert (found - exact).abs().max() > 0.01


@pytest.mark.parametrize("ends", [[], [7]])
def test_policies_that_need_more_than_keys_say_so(ends):
    """Which tokens end sentences is not known of a plain cache; sentences of equal length need not know."""
    method = {"method": "sentence_kv", "tokens": 100, "longest": 16, "ends": ends}
    eager, fast = compiled("llama", options={"kv_compression": method})
    inputs = prompt(1, 300)
    exact, _ = continued(eager, inputs, plain_cache(eager, inputs), [1] * 4)
    with pytest.warns(UserWarning, match="made without this method"):
        found, cache = continued(fast, inputs, plain_cache(eager, inputs), [1] * 4)
    assert ((found - exact).abs().max() < 2e-4) == bool(ends)
    assert (cache.layers[0].keys.physical.layout.selection is None) == bool(ends)
