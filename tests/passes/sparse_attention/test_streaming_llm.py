"""StreamingLLM: equal to the model with an explicit sink-and-window mask, in prefill, extend and decode."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt

SINKS, WINDOW = 2, 5
OPTIONS = {"sparse_attention": {"method": "streaming_llm", "sinks": SINKS, "window": WINDOW}}


def explicit_mask(padding: tuple[int, ...], past: int, new: int) -> torch.Tensor:
    """Additive mask ``[B, 1, new, past + new]`` written from the paper: first real tokens, and the newest WINDOW."""
    mask = torch.full((len(padding), 1, new, past + new), torch.finfo(torch.float32).min)
    for row, first in enumerate(padding):
        for query in range(new):
            time = past + query
            for key in range(first, time + 1):
                if key < first + SINKS or key > time - WINDOW:
                    mask[row, 0, query, key] = 0
    return mask


@pytest.mark.parametrize("padding", [(0,), (0, 4, 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_the_model_with_an_explicit_mask(family, padding):
    eager, fast = compiled(family, options=OPTIONS)
    batch, length = len(padding), 23
    inputs = prompt(batch, length, padding)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
    rows = [slice(first, None) for first in padding]
    with torch.no_grad():
        ids, mask, past = inputs["input_ids"], inputs["attention_mask"], 0
        for new in (length, 1, 1, 3, 1):
            expected = eager(
                ids,
                attention_mask=explicit_mask(padding, past, new),
                position_ids=positions,
                past_key_values=theirs,
                use_cache=True,
            ).logits
            got = fast(ids, attention_mask=mask, position_ids=positions, past_key_values=ours, use_cache=True).logits
            for row in range(batch):
                live = rows[row] if past == 0 else slice(None)
                torch.testing.assert_close(got[row, live], expected[row, live], atol=3e-5, rtol=3e-5)
            past += new
            count = 3 if past == length + 2 else 1
            ids = prompt(batch, count, seed=past)["input_ids"]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1 + torch.arange(count)
    assert not torchaccel.report(fast).declines


def test_a_window_over_everything_is_exact():
    options = {"sparse_attention": {"method": "streaming_llm", "sinks": 0, "window": 4096}}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 30, padding=(0, 7))
    assert torch.equal(greedy(fast, inputs, 20), greedy(eager, inputs, 20))


def test_sliding_window_layers_are_left_alone_and_say_so():
    eager, fast = compiled("mistral", options=OPTIONS)
    inputs = prompt(1, 12)
    with pytest.warns(UserWarning, match="streaming_llm left 3 site.*already attends to a sliding window"):
        got = greedy(fast, inputs, 8)
    assert torch.equal(got, greedy(eager, inputs, 8))


def test_static_caches_are_left_alone_and_say_so():
    eager, fast = compiled("llama", options=OPTIONS)
    inputs = prompt(1, 12)
    cache = StaticCache(config=fast.config, max_cache_len=32)
    with pytest.warns(UserWarning, match=r"streaming_llm left 3 site.*static buffer"):
        got = greedy(fast, inputs, 8, past_key_values=cache, disable_compile=True)
    assert torch.equal(got, greedy(eager, inputs, 8))


def test_encoders_are_left_alone():
    eager, fast = compiled("bert", options=OPTIONS)
    inputs = prompt(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**inputs).last_hidden_state, eager(**inputs).last_hidden_state, atol=2e-5, rtol=2e-5
        )
    assert torchaccel.report(fast).effective == {}
