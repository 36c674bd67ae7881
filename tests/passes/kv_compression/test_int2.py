"""int2 KV cache: equal to attention over what an independent quantiser stores; bytes freed; windows are exact."""

import torch
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.kivi_reference import compressed

BITS, GROUP, WINDOW = 2, 32, 40
OPTIONS = {"kv_compression": {"method": f"int{BITS}", "group": GROUP, "window": WINDOW}, "strict": True}


def test_decode_equals_attention_over_independently_quantised_tokens():
    eager, fast = compiled("llama", options=OPTIONS)
    inputs = prompt(2, 150)["input_ids"]
    with torch.no_grad():
        exact, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        expected = eager(inputs, past_key_values=exact, use_cache=True).logits
        got = fast(inputs, past_key_values=ours, use_cache=True).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        theirs = compressed(exact, BITS, GROUP, WINDOW)
        for seed in range(1, 5):
            token = prompt(2, 1, seed=seed)["input_ids"]
            expected = eager(token, past_key_values=theirs, use_cache=True).logits
            got = fast(token, past_key_values=ours, use_cache=True).logits
            # One code may round the other way.
            assert (got - expected).norm() < 2e-3 * expected.norm()
        unlike = eager(token, past_key_values=exact, use_cache=True).logits
        assert (got - unlike).norm() > 5 * (got - expected).norm()
    assert phases(fast) == ["prefill", "decode"]


def test_within_the_window_it_is_exact():
    eager, fast = compiled("llama", options={"kv_compression": {"method": f"int{BITS}", "window": 128}})
    inputs = prompt(2, 60, padding=(0, 5))
    assert torch.equal(greedy(fast, inputs, 40), greedy(eager, inputs, 40))


def test_bytes_are_really_freed():
    eager, fast = compiled("llama", dtype=torch.bfloat16, head_dim=64, options=OPTIONS)
    ids = prompt(1, 2000)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
    # A scale and a minimum for 32 values; 40 to 103 tokens of 2000 and 9 % of room are not compressed.
    tail = (WINDOW + 64) / 2000
    assert torchaccel.kv_bytes(ours) <= ((BITS + 32 / GROUP) / 16 * 1.09 + tail) * torchaccel.kv_bytes(theirs)
