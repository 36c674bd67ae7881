"""What int4 and int2 caches are checked for: equal to an independent quantiser, exact in the window, bytes freed."""

import torch
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.kivi_reference import compressed


def options(bits, **parameters):
    return {"kv_compression": {"method": f"int{bits}", **parameters}, "strict": True}


def check_decode(bits, group, window):
    eager, fast = compiled("llama", options=options(bits, group=group, window=window))
    inputs = prompt(2, 150)["input_ids"]
    with torch.no_grad():
        exact, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        expected = eager(inputs, past_key_values=exact, use_cache=True).logits
        got = fast(inputs, past_key_values=ours, use_cache=True).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        theirs = compressed(exact, bits, group, window)
        for seed in range(1, 5):
            token = prompt(2, 1, seed=seed)["input_ids"]
            expected = eager(token, past_key_values=theirs, use_cache=True).logits
            got = fast(token, past_key_values=ours, use_cache=True).logits
            # One code may round the other way.
            assert (got - expected).norm() < 2e-3 * expected.norm()
        unlike = eager(token, past_key_values=exact, use_cache=True).logits
        assert (got - unlike).norm() > 5 * (got - expected).norm()
    assert phases(fast) == ["prefill", "decode"]


def check_window(bits):
    eager, fast = compiled("llama", options=options(bits, window=128))
    inputs = prompt(2, 60, padding=(0, 5))
    assert torch.equal(greedy(fast, inputs, 40), greedy(eager, inputs, 40))


def check_bytes(bits, group, window):
    asked = options(bits, group=group, window=window)
    eager, fast = compiled("llama", dtype=torch.bfloat16, head_dim=64, options=asked)
    ids = prompt(1, 2000)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
    # A scale and a minimum for each group; window and tail of 2000 tokens and 9 % of room are not compressed.
    tail = (window + 64) / 2000
    assert torchaccel.kv_bytes(ours) <= ((bits + 32 / group) / 16 * 1.09 + tail) * torchaccel.kv_bytes(theirs)
