"""Unified Layer Skipping: the published layer sets, and decode equal to a model without the skipped layers."""

import copy

import pytest
import torch
from torchaccel.passes.layer_skipping.unified import executed_layers
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, prompt


@pytest.mark.parametrize(
    ("layers", "speedup", "expected"),
    [
        (30, 2, [*range(0, 27, 2), 29]),
        (30, 3, [0, 3, 6, 9, 12, 15, 18, 21, 24, 29]),
        (30, 5, [0, 6, 12, 18, 24, 29]),
        (30, 10, [0, 15, 29]),
        (32, 2, [*range(0, 29, 2), 31]),
        (32, 4, [0, 4, 8, 12, 16, 20, 24, 31]),
        (12, 2, [0, 2, 4, 6, 8, 11]),
        (6, 2, [0, 3, 5]),
        (4, 1, [0, 1, 2, 3]),
        (4, 2, [0, 3]),
    ],
)
def test_layers_of_the_paper(layers, speedup, expected):
    assert executed_layers(layers, speedup) == expected


def test_too_high_a_target_is_an_error():
    with pytest.raises(ValueError, match="leave 1; at least 2"):
        executed_layers(4, 3)


def test_decode_equals_the_model_without_the_skipped_layers():
    eager, fast = compiled("llama", layers=6, options={"layer_skipping": {"method": "unified", "target_speedup": 2}})
    kept = executed_layers(6, 2)
    short = copy.deepcopy(eager)
    short.model.layers = torch.nn.ModuleList(short.model.layers[i] for i in kept)
    for place, layer in enumerate(short.model.layers):
        layer.self_attn.layer_idx = place
    inputs = prompt(2, 15, padding=(0, 4))
    steps = [prompt(2, 1, seed=s)["input_ids"] for s in range(1, 4)] + [prompt(2, 3, seed=9)["input_ids"]]
    with torch.no_grad():
        whole, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        expected = eager(**inputs, past_key_values=whole, use_cache=True).logits
        got = fast(**inputs, past_key_values=ours, use_cache=True).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        theirs = DynamicCache(config=eager.config)
        for place, index in enumerate(kept):
            theirs.update(whole.layers[index].keys, whole.layers[index].values, place)
        mask = inputs["attention_mask"]
        for step in steps:
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            # The number of layers that are left also decides how many cache layers the model may look at.
            expected = short(step, attention_mask=mask, past_key_values=theirs, use_cache=True).logits
            got = fast(step, attention_mask=mask, past_key_values=ours, use_cache=True).logits
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert ours.get_seq_length() == theirs.get_seq_length() == 21
    sizes = [torchaccel.kv_bytes([layer.keys, layer.values]) for layer in ours.layers]
    assert [index for index, size in enumerate(sizes) if size] == kept


def test_one_skipped_layer_is_named_in_the_report():
    _, fast = compiled("llama", layers=4, options={"layer_skipping": "unified"})
    with torch.no_grad():
        cache = DynamicCache(config=fast.config)
        fast(prompt(1, 5)["input_ids"], past_key_values=cache, use_cache=True)
        fast(prompt(1, 1)["input_ids"], past_key_values=cache, use_cache=True)
    record = torchaccel.report(fast).records[-1]
    result = next(p for p in record.passes if p.name == "unified")
    assert result.sites == ["model.layers.1"] and "[0, 2, 3] of 4" in result.detail
