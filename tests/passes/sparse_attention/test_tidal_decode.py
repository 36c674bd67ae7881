"""TidalDecode against a mask over eager attention, and the worked example of its specification."""

from types import SimpleNamespace

import pytest
import torch
from torchaccel.passes.base import Fuel, RewriteContext
from torchaccel.passes.sparse_attention.tidal_decode import TidalDecode, TidalDecodeOptions
from transformers import DynamicCache

from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.passes.listed_reference import Lister, listing
from torchaccel.errors import OptionsError
from torchaccel.options import resolve

METHOD = {"method": "tidal_decode", "tokens": 24, "dense_layers": 1, "reselect": [3]}


class TidalRule(Lister):
    """Layers ``choosing`` see everything; those behind see what the last of them gave most probability."""

    def __init__(self, tokens, choosing):
        self.tokens, self.choosing = tokens, choosing

    def step(self, layer, q, k, valid):
        if layer < min(self.choosing):
            return torch.ones(k.shape[:3], dtype=torch.bool)
        if layer not in self.choosing:
            return self.chosen.clone()
        self.chosen = torch.zeros(k.shape[:3], dtype=torch.bool)
        for b, h in torch.ones(k.shape[:2]).nonzero().tolist():
            logits = q[b].unflatten(0, (k.shape[1], -1))[h, :, 0] @ k[b, h].T * k.shape[3] ** -0.5
            given = torch.softmax(logits.masked_fill(~valid[b], -torch.inf), -1).sum(0)[:-1]
            self.chosen[b, h, given.topk(min(self.tokens - 1, len(given))).indices] = True
        return torch.ones_like(self.chosen)


def pair(rule=None, layers=5, **arguments):
    eager, fast = compiled("llama", layers=layers, options={"sparse_attention": METHOD, **arguments})
    return eager, listing(compiled("llama", layers=layers)[0], rule or TidalRule(24, (1, 3))), fast


@pytest.mark.parametrize("padding", [(0, 0), (0, 21)])
def test_generation_equals_the_masked_reference(padding):
    eager, reference, fast = pair(strict=True)
    inputs = prompt(2, 90, padding=padding)
    found = greedy(reference, inputs, 64)
    assert torch.equal(greedy(fast, inputs, 64), found)
    assert not torch.equal(found, greedy(eager, inputs, 64))
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)


def test_a_budget_that_covers_everything_is_exact():
    eager, _, fast = pair(sparse_attention=METHOD | {"tokens": 512})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def continued(model, cache, steps):
    """Logits of the last token of each call; a negative number crops the cache by so many tokens first."""
    found = []
    with torch.no_grad():
        for seed, step in enumerate(steps):
            if step < 0:
                cache.crop(step)
            else:
                ids = prompt(2, step, seed=seed)["input_ids"]
                found.append(model(ids, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found)


def plain_cache(model, tokens):
    """A cache of plain tensors that an eager model made."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2, tokens)["input_ids"], past_key_values=cache, use_cache=True)
    return cache


def test_turns_crops_and_plain_caches_equal_the_reference():
    eager, reference, fast = pair(strict=True)
    steps = [1, 1, 1, 6, 1, 1, -5, 1, 1, -42, 1, 1]
    expected = continued(reference, plain_cache(eager, 101), steps)
    torch.testing.assert_close(continued(fast, plain_cache(eager, 101), steps), expected, atol=2e-4, rtol=0)


def test_cropped_tokens_that_are_passed_again_are_exact():
    """The cache correction of the publication: a turn of several tokens attends to everything."""
    eager, _, fast = pair()
    ids, exact, cache = prompt(2, 110)["input_ids"], *(DynamicCache(config=eager.config) for _ in range(2))
    with torch.no_grad():
        eager(ids, past_key_values=exact, use_cache=True)
        fast(ids[:, :90], past_key_values=cache, use_cache=True)
        for column in range(90, 110):
            fast(ids[:, column : column + 1], past_key_values=cache, use_cache=True)

        def error():
            pairs = zip(cache.layers, exact.layers, strict=True)
            return max((own.keys.dense() - other.keys).abs().max() for own, other in pairs)

        assert error() > 0.01
        cache.crop(-20)
        fast(ids[:, 90:], past_key_values=cache, use_cache=True)
        assert error() < 2e-4


def test_int4_caches_read_the_listed_tokens():
    """Everything is in the window of full precision still."""
    _, reference, fast = pair(kv_compression={"method": "int4", "window": 256}, strict=True)
    inputs = prompt(2, 90, padding=(0, 21))
    assert torch.equal(greedy(fast, inputs, 20), greedy(reference, inputs, 20))


def test_int8_caches_read_the_listed_tokens():
    eager, reference, fast = pair(kv_compression="int8", strict=True)
    given = [plain_cache(eager, 150) for _ in range(3)]
    found, expected, exact = (continued(m, c, [1, 1, 1]) for m, c in zip((fast, reference, eager), given, strict=True))
    assert (found - expected).abs().mean() < 0.1 * (exact - expected).abs().mean()


def test_layers_that_store_fewer_tokens_read_everything_and_say_so():
    """Layers from 2 on hold half of the prompt: neither can 2 and 4 read by another's list, nor 3 choose."""
    _, _, fast = pair(token_pruning={"method": "fastv", "keep": 0.5, "layer": 2})
    with pytest.warns(UserWarning, match=r"left 3 site\(s\) exact.*cannot read by the same list"):
        greedy(fast, prompt(1, 90), 2)


def chosen_by(count, kv_heads=None, **options):
    """For each layer the one by whose choice it reads, its own number where it chooses, None for dense ones."""
    cache = SimpleNamespace(kind="concatenated", window=None)
    heads = kv_heads or [2] * count
    sites = [
        SimpleNamespace(index=i, layer=i, name=f"layers.{i}", heads=4, kv_heads=heads[i], key_cache=cache)
        for i in range(count)
    ]
    anatomy = SimpleNamespace(attentions=sites, layers=sites)
    context = RewriteContext(None, None, torch.device("cpu"), Fuel(None), anatomy)
    result = TidalDecode(TidalDecodeOptions(**options)).apply(context)
    plans = [context.plan(site) for site in sites]
    own = [plan.leader if plan.leader is not None else i for i, plan in enumerate(plans)]
    return [layer if plan.selection else None for layer, plan in zip(own, plans, strict=True)], result


def test_which_layers_choose():
    assert chosen_by(32)[0] == [None, None, *[2] * 11, *[13] * 19]
    assert chosen_by(6, reselect=(-2,), dense_layers=0)[0] == [0, 0, 0, 0, 4, 4]
    assert chosen_by(6, reselect=(), layers=(1, 3, 5))[0] == [None, 1, None, 1, None, 1]
    # Lists are for KV heads: layers with others choose for themselves.
    assert chosen_by(6, [2, 2, 4, 4, 2, 2], reselect=(), dense_layers=0)[0] == [0, 0, 2, 2, 4, 4]
    assert "layer 6 of 6" in str(chosen_by(6, reselect=(6,))[1].declines[0])


def test_layers_that_evict_read_everything_they_kept():
    """Each keeps other tokens, so that none can read by the list of another; that is said."""
    evicting = {"kv_compression": {"method": "snapkv", "tokens": 60, "window": 8}}
    inputs = prompt(2, 90)
    alone = compiled("llama", options=evicting)[1]
    both = compiled("llama", options=evicting | {"sparse_attention": METHOD | {"reselect": [0]}})[1]
    with pytest.warns(UserWarning, match="other tokens than each other"):
        assert torch.equal(greedy(both, inputs, 8), greedy(alone, inputs, 8))


def test_options_are_checked():
    with pytest.raises(OptionsError, match="tokens"):
        resolve({"sparse_attention": {"method": "tidal_decode", "tokens": 1}})
