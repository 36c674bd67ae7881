"""Methods of the family together: evict, then quantise what stays; a method of its own for some layers."""

import torch
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import masked
from tests.passes.kv_compression.test_snapkv import SnapKVRule
from torchaccel.cost.traffic import Traffic
from torchaccel.evaluation.tasks.sensitivity import one_layer_at_a_time
from torchaccel.evaluation.variants import method_label, requested


def test_eviction_then_quantisation():
    """The window covers what is kept, so quantisation has nothing to do yet: tokens equal those of SnapKV alone."""
    methods = [{"method": "snapkv", "tokens": 24, "window": 6, "kernel": 3}, {"method": "int8"}]
    eager, fast = compiled("llama", options={"kv_compression": methods, "strict": True})
    inputs = prompt(2, 60, padding=(0, 7))
    reference = masked(eager, SnapKVRule(24, 6, 3))
    assert torch.equal(greedy(fast, inputs, 30), greedy(reference, inputs, 30))
    assert {site.layout for record in torchaccel.report(fast).records for site in record.sites} == {"int8 SnapKVPolicy"}


def test_bytes_of_both_multiply():
    methods = [{"method": "snapkv", "ratio": 0.25}, {"method": "int4", "window": 0}]
    eager, fast = compiled("llama", dtype=torch.bfloat16, head_dim=64, options={"kv_compression": methods})
    ids = prompt(1, 4000)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
    # A quarter of the tokens, 4.5 of 16 bits, columns of 4 bytes per token and head; room and a tail of 64 tokens.
    assert torchaccel.kv_bytes(ours) < 0.25 * (4.5 / 16 + 4 / 256 + 0.08) * 1.1 * torchaccel.kv_bytes(theirs)


def test_layers_have_methods_of_their_own():
    methods = [{"method": "snapkv", "tokens": 20, "window": 4, "layers": [1]}, {"method": "int8", "layers": [-1]}]
    _, fast = compiled("llama", options={"kv_compression": methods, "strict": True})
    greedy(fast, prompt(1, 60), 4)
    for record in torchaccel.report(fast).records:
        assert [site.layout for site in record.sites] == ["dense", "dense SnapKVPolicy", "int8"]
    assert phases(fast) == ["prefill", "decode"]


def test_several_methods_are_named_and_measured_together():
    options = {"kv_compression": [{"method": "snapkv", "ratio": 0.5}, "int4"]}
    assert method_label(options) == "snapkv+int4"
    asked = requested(options)
    assert [m["method"] for m in asked["kv_compression"]] == ["snapkv", "int4"] and requested(asked) == asked
    assert one_layer_at_a_time(options, 2)[1]["kv_compression"][1]["layers"] == [1]
    traffic = Traffic(asked)
    assert (
        traffic.stored(1000, 100.0) == 500 and traffic.formats("bfloat16", 64)[0].kind == "int4" and not traffic.unknown
    )
