"""int8 KV cache: equal to attention over keys and values quantised by an independent quantiser; bytes really freed."""

import torch
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt

BLOCK = 64
OPTIONS = {"kv_compression": "int8"}


def quantised(x: torch.Tensor, dim: int) -> torch.Tensor:
    """8-bit asymmetric quantisation of groups along ``dim``, scale and minimum in float16, read back."""
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low) / 255 * (1 + 2**-10)).half().float()
    return ((x - low) / step).round().clamp(0, 255) * step + low


def compressed(cache: DynamicCache) -> DynamicCache:
    """What an int8 cache of the same tokens holds: whole blocks of 64 quantised, the rest as it is."""
    out = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys.clone(), layer.values.clone()
        for first in range(0, keys.shape[2] // BLOCK * BLOCK, BLOCK):
            block = slice(first, first + BLOCK)
            keys[:, :, block] = quantised(keys[:, :, block], 2)
            values[:, :, block] = quantised(values[:, :, block], 3)
        out.update(keys, values, index)
    return out


def test_decode_equals_attention_over_independently_quantised_tokens():
    eager, fast = compiled("llama", options=OPTIONS)
    ids = prompt(2, 130)["input_ids"]
    with torch.no_grad():
        exact, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        expected = eager(ids, past_key_values=exact, use_cache=True).logits
        got = fast(ids, past_key_values=ours, use_cache=True).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        theirs = compressed(exact)
        for seed in range(1, 5):
            token = prompt(2, 1, seed=seed)["input_ids"]
            expected = eager(token, past_key_values=theirs, use_cache=True).logits
            got = fast(token, past_key_values=ours, use_cache=True).logits
            # One code may round the other way: a step of 1/255 of a group's range.
            torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)
            assert (got - expected).norm() < 2e-4 * expected.norm()


def test_short_contexts_are_exact():
    eager, fast = compiled("llama", options=OPTIONS)
    inputs = prompt(2, 20, padding=(0, 5))
    assert torch.equal(greedy(fast, inputs, 40), greedy(eager, inputs, 40))


def test_long_generations_stay_close_to_exact_attention():
    eager, fast = compiled("llama", options=OPTIONS)
    ids = prompt(1, 300)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        for part in ids.split((100, *([1] * 150), 50), 1):
            expected = eager(part, past_key_values=theirs, use_cache=True).logits[:, -1]
            got = fast(part, past_key_values=ours, use_cache=True).logits[:, -1]
            assert (got - expected).norm() < 0.02 * expected.norm()
    assert torchaccel.report(fast).graphs == 3


def test_bytes_are_really_freed():
    eager, fast = compiled("llama", dtype=torch.bfloat16, options=OPTIONS)
    ids = prompt(1, 2000)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
    # Head dimension 16: codes 1 byte, values' scales 4 bytes per 16 channels, keys' 4 bytes per 64 tokens; 6 % slack.
    assert torchaccel.kv_bytes(ours) < 1.1 * 0.66 * torchaccel.kv_bytes(theirs)


def test_beams_reorder_the_quantised_cache():
    _, fast = compiled("llama", options=OPTIONS)
    inputs = prompt(1, 100)
    first = greedy(fast, inputs, 12, num_beams=3)
    assert torch.equal(first, greedy(fast, inputs, 12, num_beams=3)) and torchaccel.report(fast).graphs <= 3
