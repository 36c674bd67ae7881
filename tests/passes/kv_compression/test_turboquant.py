"""TurboQuant: attention over rotated codes is that over what they stand for; reading the cache turns it back."""

import torch
from transformers import DynamicCache

from tests.e2e.generation import compiled, greedy, phases, prompt

# Lloyd-Max tables of the standard normal distribution for 4 and 2 bits, as published.
POINTS = {
    4: (0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
    2: (0.45278, 1.51042),
}


def coded(x, bits):
    """Every token turned, rounded to the table and brought to its own norm, turned back; written anew."""
    dim = x.shape[-1]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turn = matrix * (torch.randint(0, 2, (dim,), generator=generator) * 2.0 - 1.0) / dim**0.5
    points = torch.tensor([-p for p in reversed(POINTS[bits])] + list(POINTS[bits]))
    norm = x.norm(dim=-1, keepdim=True)
    y = x @ turn.T / norm * dim**0.5
    nearest = points[(y[..., None] - points).abs().argmin(-1)]
    nearest = nearest / nearest.norm(dim=-1, keepdim=True) * norm
    return nearest @ turn


def test_decode_equals_attention_over_independently_coded_tokens():
    options = {"kv_compression": {"method": "turboquant", "value_bits": 2}, "strict": True}
    eager, fast = compiled("llama", options=options)
    ids = prompt(2, 150)["input_ids"]
    with torch.no_grad():
        exact, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        expected = eager(ids, past_key_values=exact, use_cache=True).logits
        got = fast(ids, past_key_values=ours, use_cache=True).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        theirs = DynamicCache()
        for index, layer in enumerate(exact.layers):
            keys, values = layer.keys.clone(), layer.values.clone()
            keys[:, :, :128], values[:, :, :128] = coded(keys[:, :, :128], 4), coded(values[:, :, :128], 2)
            theirs.update(keys, values, index)
        stored = ours.layers[0].keys + 0  # reads the tokens back
        assert (stored - theirs.layers[0].keys).norm() < 1e-3 * stored.norm()
        for seed in range(1, 5):
            token = prompt(2, 1, seed=seed)["input_ids"]
            expected = eager(token, past_key_values=theirs, use_cache=True).logits
            got = fast(token, past_key_values=ours, use_cache=True).logits
            # A coordinate next to an edge of the table may go either way.
            assert (got - expected).norm() < 1e-2 * expected.norm()
    assert phases(fast) == ["prefill", "decode"]


def test_copies_of_a_cache_hold_the_same_tokens():
    _, fast = compiled("llama", options={"kv_compression": "turboquant", "strict": True})
    inputs = prompt(2, 100, padding=(0, 9))
    assert torch.equal(greedy(fast, inputs, 6, num_beams=2), greedy(fast, inputs, 6, num_beams=2))
    cache = DynamicCache()
    with torch.no_grad():
        fast(inputs["input_ids"], past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys
    torch.testing.assert_close(keys.index_select(0, torch.tensor([1, 0])).dense(), keys.dense()[[1, 0]])
