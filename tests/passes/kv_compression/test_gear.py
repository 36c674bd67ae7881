"""GEAR: closer to exact attention than its codes alone, as close as its corrections say; bytes freed."""

import pytest
import torch
from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, phases, prompt


def logits(options, family="llama"):
    """Logits of four forced tokens after 150, eager's and ours, and the cache."""
    eager, fast = compiled(family, options={"kv_compression": options, "strict": True})
    ids = prompt(2, 150)["input_ids"]
    theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
    with torch.no_grad():
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
        steps = []
        for seed in range(1, 5):
            token = prompt(2, 1, seed=seed)["input_ids"]
            steps.append(
                [
                    model(token, past_key_values=cache, use_cache=True).logits
                    for model, cache in ((eager, theirs), (fast, ours))
                ]
            )
    assert phases(fast) == ["prefill", "decode"]
    expected, got = (torch.stack(part) for part in zip(*steps, strict=True))
    return expected, got, ours


def test_corrections_bring_attention_closer_to_exact():
    plain = {"method": "int2", "group": 64, "window": 0}
    expected, coded, _ = logits(plain)
    _, repaired, _ = logits({"method": "gear", "window": 0, "rank": 4, "outliers": 4})
    _, exact, _ = logits({"method": "gear", "window": 0, "bits": 8, "rank": 4, "outliers": 4})
    error = [(x - expected).norm() / expected.norm() for x in (coded, repaired, exact)]
    assert error[1] < 0.8 * error[0] and error[2] < 0.1 * error[0]


def test_what_is_stored_is_the_decomposition():
    """The first layer's keys, which no earlier layer's error reaches, against the storage format's own reading."""
    _, _, cache = logits({"method": "gear", "window": 0, "group": 32})
    eager, _ = compiled("llama")
    exact = DynamicCache(config=eager.config)
    with torch.no_grad():
        eager(prompt(2, 150)["input_ids"], past_key_values=exact, use_cache=True)
    keys = exact.layers[0].keys
    fmt = KVFormat("int2", "float32", 16, "channel", group=32, rank=2, outliers=2)
    buf = kv_format.allocate(fmt, 2, 2, 256, torch.device("cpu"))
    kv_format.append(fmt, buf, 0, keys)
    torch.testing.assert_close(
        cache.layers[0].keys[:, :, :128], kv_format.read(fmt, buf, 0, 128, 150), atol=1e-4, rtol=1e-4
    )


def test_odd_outliers_are_refused():
    with pytest.raises(torchaccel.errors.OptionsError, match="even number"):
        torchaccel.options.resolve({"kv_compression": {"method": "gear", "outliers": 3}})
