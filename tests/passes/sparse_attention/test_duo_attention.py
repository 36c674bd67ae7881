"""DuoAttention that stores everything, against masks over eager attention; plans of the KV family serve it."""

import pytest
import torch
from torchaccel.passes.kv_compression.duo_attention import DuoAttention
from torchaccel.passes.sparse_attention.duo_attention import DuoAttentionReading, DuoAttentionReadingOptions

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt
from tests.models.families import VOCAB, build
from tests.passes.static_reference import assert_exact, assert_generation_equals_the_rule
from torchaccel.calibration.calibrate import calibrate
from torchaccel.errors import CalibrationError
from torchaccel.options import resolve

HEADS = {0: (1,), 2: (0, 1)}
METHOD = {"method": "duo_attention", "retrieval_heads": HEADS, "sinks": 3, "recent": 9}


def seen(layer, head, first, query, key, new):
    return head in HEADS.get(layer, ()) or key < first + 3 or query - key < 9


def test_generation_equals_the_masked_reference():
    fast = assert_generation_equals_the_rule(METHOD, seen, tokens=42, padding=(0, 6))
    sites = torchaccel.report(fast).records[0].sites
    # A layer of retrieval heads is exact, one of streaming heads has a window as a whole.
    assert [(site.window, site.sinks) for site in sites] == [(9, 3), (9, 3), (None, 0)]


def test_capped_scores_and_layers_with_windows_of_their_own():
    def rule(layer, *pair):
        return layer % 2 == 0 or seen(0, *pair)

    method = {**METHOD, "retrieval_heads": {1: (1,), 3: (1,)}}
    with pytest.warns(UserWarning, match="duo_attention left 2 site.*already attends to a sliding window"):
        assert_generation_equals_the_rule(
            method, rule, tokens=42, padding=(0, 6), new=8, family="gemma2", strict=False, attn_logit_softcapping=2.0
        )


def test_windows_beyond_the_text_are_exact():
    assert_exact({**METHOD, "sinks": 0, "recent": 4096})


def test_bfloat16_over_quantised_caches():
    options = {"sparse_attention": METHOD, "kv_compression": "int8", "strict": True}
    _, fast = compiled("llama", dtype=torch.bfloat16, options=options)
    assert greedy(fast, prompt(2, 42, padding=(0, 6)), 8).shape == (2, 50)


def test_several_tokens_at_once_are_as_one_by_one():
    _, fast = compiled("llama", options={"sparse_attention": METHOD, "strict": True})
    ids, found = prompt(2, 60)["input_ids"], []
    with torch.no_grad():
        for size in (1, 18):
            cache = fast(ids[:, :24], use_cache=True).past_key_values
            parts = [fast(part, past_key_values=cache, use_cache=True).logits for part in ids[:, 24:].split(size, 1)]
            found.append(torch.cat(parts, 1))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


def test_a_plan_of_the_kv_family_is_accepted():
    ids = torch.randint(3, VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    plan = calibrate(build("llama"), "duo_attention", [ids], {"sinks": 3, "recent": 12, "steps": 2})
    options = resolve({"sparse_attention": {"method": "duo_attention", "plan": plan}})
    method = options.methods[0]
    assert isinstance(method, DuoAttentionReading)
    assert (method.options.sinks, method.options.recent) == (3, 12)
    other = resolve({"kv_compression": {"method": "duo_attention", "plan": plan}}).methods[0]
    assert isinstance(other, DuoAttention)
    _, fast = compiled("llama", options={"sparse_attention": {"method": "duo_attention", "plan": plan}, "strict": True})
    greedy(fast, prompt(1, 42), 2)
    report = torchaccel.report(fast)
    assert report.effective == {"duo_attention": {"prefill": 3, "decode": 3}} and not report.declines


def test_lists_and_windows_of_heads_exclude_each_other():
    _, fast = compiled("llama", options={"sparse_attention": ["xattention", METHOD]})
    greedy(fast, prompt(1, 42), 2)
    assert any("windows of some heads are for plain tokens" in line for line in torchaccel.report(fast).declines)


def test_without_heads_a_plan_is_asked_for():
    with pytest.raises(CalibrationError, match="torchaccel calibrate --method duo_attention"):
        resolve({"sparse_attention": "duo_attention"})


def test_heads_that_do_not_exist_are_declined():
    _, fast = compiled("llama", options={"sparse_attention": {**METHOD, "retrieval_heads": {0: (7,)}}, "strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"DeclinedError.*KV head 7 of 2"):
        greedy(fast, prompt(1, 20), 2)


def test_options_are_those_of_the_kv_family():
    assert DuoAttentionReadingOptions.model_fields.keys() == DuoAttention.Options.model_fields.keys()


def test_over_a_cache_whose_heads_keep_different_numbers_of_tokens():
    """AdaKV with room for everything changes nothing but the layout."""
    adakv = {"kv_compression": {"method": "adakv", "tokens": 512}}
    _, alone = compiled("llama", options={"sparse_attention": METHOD, "strict": True})
    _, both = compiled("llama", options={"sparse_attention": METHOD, "strict": True, **adakv})
    inputs = prompt(2, 42, padding=(0, 6))
    assert torch.equal(greedy(alone, inputs, 24), greedy(both, inputs, 24))
    assert "Ada" in torchaccel.report(both).records[1].sites[0].layout
