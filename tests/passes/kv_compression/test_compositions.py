"""Methods of the family together: evict, then quantise what stays; a method of its own for some layers."""

import pytest
import torch
from torchaccel.passes.base import Reason
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.models.families import build
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


def test_what_comes_back_to_a_pruned_prompt_has_its_columns():
    """Every stored token is the one that stood in its column, in the layers with fewer tokens, too."""
    method = {"method": "loopserve", "tokens": 14, "interval": 3, "restore": True}
    options = {"kv_compression": method, "token_pruning": {"method": "fastv", "layer": 1, "keep": 0.5}, "strict": True}
    _, fast = compiled("llama", options=options)
    ids = prompt(2, 50)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        for first, last in ((0, 42), *((t, t + 1) for t in range(42, 50))):
            fast(ids[:, first:last], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for index, layer in enumerate(cache.layers):
        storage = layer.keys.physical
        aside = storage.record.aside
        assert aside.slots == 14 and storage.filled == 22
        whole = aside.columns if index else torch.arange(42).expand(2, 1, -1)
        assert whole.shape[2] == (21 if index else 42)
        stored, keys = storage.positions[..., :14].long(), storage.read(0, 14)
        for row, head in torch.ones(stored.shape[:2]).nonzero().tolist():
            place = [whole[row, 0].tolist().index(column) for column in stored[row, head].tolist()]
            assert place == sorted(set(place)) and torch.equal(keys[row, head], aside.prompt.keys[row, head, place])
        assert storage.positions[0, :, 14:22].tolist() == [list(range(42, 50))] * 2


def test_a_prompt_set_aside_and_quantisation():
    methods = [{"method": "loopserve", "tokens": 80, "interval": 5, "restore": True}, {"method": "int8"}]
    _, fast = compiled("llama", options={"kv_compression": methods, "strict": True})
    _, dense = compiled("llama", options={"kv_compression": methods[:1], "strict": True})
    ids = prompt(2, 112)["input_ids"]
    logits = []
    for model in (fast, dense):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :100], past_key_values=cache, use_cache=True)
            steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True) for t in range(100, 112)]
        logits.append(torch.stack([step.logits for step in steps]))
    error = (logits[0] - logits[1]).abs()
    assert error.max() > 0 and error.mean() < 0.02 * logits[1].abs().mean()


def test_many_steps_compile_nothing_anew():
    inputs = prompt(1, 300)
    for method in (
        {"method": "loopserve", "tokens": 64, "restore": True},
        {"method": "video_xl", "ratio": 0.3, "chunk": 32, "restore": True},
        {"method": "look_m", "image_tokens": [[20, 98]], "ratio": 0.3},
    ):
        _, fast = compiled("llama", layers=1, options={"kv_compression": method, "strict": True})
        greedy(fast, inputs, 512)
        assert phases(fast) == ["prefill", "decode"] and torchaccel.report(fast).recompiles == 0


@pytest.mark.parametrize("first", ["int8", "zipcache"])
def test_two_formats_are_not_combined(first):
    methods = [{"method": first}, {"method": "int4"}]
    ids = prompt(1, 20)["input_ids"]
    with pytest.warns(UserWarning, match="int4 left 1 site"):
        found = torchaccel.explain(build("llama", layers=1), ids, options={"kv_compression": methods, "gate": False})
    (decline,) = found.declines
    assert Reason.TWO_FORMATS.value in decline and "int4 comes second" in decline
