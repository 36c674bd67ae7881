"""With no options the model answers with the same tokens, through the fewest graphs."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.models.families import CAUSAL, ENCODERS, build
from torchaccel.runtime.kv import LogicalKV


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_generation_equals_eager_token_for_token(family):
    eager, fast = compiled(family)
    for inputs in (prompt(1, 11), prompt(3, 13, padding=(0, 4, 1))):
        assert torch.equal(greedy(fast, inputs, 64), greedy(eager, inputs, 64))
    assert all_lowered(fast), torchaccel.report(fast).declines


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_run_exactly(family):
    eager, fast = compiled(family)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if family == "vit" else prompt(2, 9, padding=(0, 3))
    with torch.no_grad():
        expected, got = eager(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert phases(fast) == ["encoder"]


def test_a_generation_is_two_graphs_whatever_its_length():
    _, fast = compiled("llama")
    greedy(fast, prompt(1, 10), 5)
    assert phases(fast) == ["prefill", "decode"]
    greedy(fast, prompt(1, 10), 200)
    assert torchaccel.report(fast).graphs == 2
    for length in (17, 23, 42):
        greedy(fast, prompt(1, length), 3)
    assert phases(fast) == ["prefill", "decode", "prefill"]


def test_beam_search_equals_eager_in_at_most_three_graphs():
    eager, fast = compiled("llama")
    inputs = prompt(2, 9, padding=(0, 2))
    assert torch.equal(greedy(fast, inputs, 20, num_beams=3), greedy(eager, inputs, 20, num_beams=3))
    assert torchaccel.report(fast).graphs <= 3 and all_lowered(fast)


def test_sampling_and_several_sequences_follow_the_same_seed():
    eager, fast = compiled("llama")
    found = []
    for model in (eager, fast):
        torch.manual_seed(5)
        found.append(greedy(model, prompt(2, 9), 12, do_sample=True, num_return_sequences=2))
    assert torch.equal(*found)


def test_assisted_generation_crops_the_cache_and_stays_exact():
    eager, fast = compiled("llama")
    draft = build("llama", layers=1)
    inputs = prompt(1, 9)
    assert torch.equal(greedy(fast, inputs, 24, assistant_model=draft), greedy(eager, inputs, 24))


def test_inference_mode():
    eager, fast = compiled("llama")
    inputs = prompt(1, 9)
    with torch.inference_mode():
        got = fast.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, greedy(eager, inputs, 20))


def test_a_static_cache_is_attended_by_its_mask():
    eager, fast = compiled("llama")
    inputs = prompt(2, 9, padding=(0, 2))
    expected = greedy(eager, inputs, 16)
    config = fast.config
    with torch.no_grad():
        for _ in range(2):
            cache = StaticCache(config=config, max_cache_len=64)
            got = fast.generate(
                **inputs, max_new_tokens=16, do_sample=False, past_key_values=cache, disable_compile=True
            )
            assert torch.equal(got, expected)
    kernels = {site.kernel for r in torchaccel.report(fast).records if r.phase == "decode" for site in r.sites}
    assert kernels == {"cpp"}


def test_two_continuations_of_one_cache_do_not_disturb_each_other():
    eager, fast = compiled("llama")
    ids = prompt(1, 12)["input_ids"]
    first, second = prompt(1, 1, seed=1)["input_ids"], prompt(1, 1, seed=2)["input_ids"]

    def run(model):
        logits = []
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache, use_cache=True)
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            for token in (first, second, first):
                for layer, (keys, values) in zip(cache.layers, kept, strict=True):
                    layer.keys, layer.values = keys, values
                logits.append(model(token, past_key_values=cache, use_cache=True).logits)
                logits.append(model(token, past_key_values=cache, use_cache=True).logits)
        return logits

    for expected, got in zip(run(eager), run(fast), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_the_cache_the_user_gets_back_reads_like_a_tensor():
    eager, fast = compiled("llama")
    inputs = prompt(2, 9)
    with torch.no_grad():
        expected, got = (m.generate(**inputs, max_new_tokens=9, return_dict_in_generate=True) for m in (eager, fast))
    for ours, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert isinstance(ours.keys, LogicalKV) and ours.keys.shape == theirs.keys.shape
        torch.testing.assert_close(ours.keys + 0, theirs.keys, atol=2e-5, rtol=2e-5)
    torchaccel.to_dense(got.past_key_values)
    assert type(got.past_key_values.layers[0].keys) is torch.Tensor


def test_a_prompt_continued_in_a_second_turn():
    eager, fast = compiled("llama")
    ids = prompt(1, 30)["input_ids"]
    with torch.no_grad():
        for model in (eager, fast):
            model.found = []
            cache = DynamicCache(config=model.config)
            for part in (ids[:, :12], ids[:, 12:13], ids[:, 13:17], ids[:, 17:]):
                model.found.append(model(part, past_key_values=cache, use_cache=True).logits)
    for expected, got in zip(eager.found, fast.found, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert {"prefill", "decode", "extend"} <= set(phases(fast)) and all_lowered(fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_stay_as_close_to_float32_as_eager(dtype):
    truth = build("llama")
    eager, fast = compiled("llama", dtype=dtype)
    ids, token = prompt(1, 20)["input_ids"], prompt(1, 1, seed=3)["input_ids"]
    found = []
    with torch.no_grad():
        for model in (truth, eager, fast):
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache, use_cache=True)
            found.append(model(token, past_key_values=cache, use_cache=True).logits.float())
    reference, theirs, ours = found
    assert (ours - reference).norm() <= 1.5 * (theirs - reference).norm() + 1e-3


def test_lengths_that_turn_out_to_be_equal_are_still_known_to_the_graph():
    """Lengths of two caches that are one symbol in the end: the input that names it may be one that is gone."""
    eager, fast = compiled("gemma2", num_hidden_layers=2)
    inputs = prompt(1, 5)
    assert torch.equal(greedy(fast, inputs, 10), greedy(eager, inputs, 10))
    eager, fast = compiled("mistral", sliding_window=150)
    ids = prompt(3, 140)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
        token, mask = prompt(3, 1)["input_ids"], torch.ones(3, 141)
        expected = eager(token, attention_mask=mask, past_key_values=theirs, use_cache=True).logits
        got = fast(token, attention_mask=mask, past_key_values=ours, use_cache=True).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
