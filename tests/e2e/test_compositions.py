"""The four families compose in every subset."""

from itertools import product

import pytest
import torch

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt

# Parameters under which a method changes nothing on this prompt: int8 keeps the newest 64 tokens in full precision.
NEUTRAL = {
    "token_pruning": {"method": "fastv", "keep": 1.0, "layer": 1},
    "layer_skipping": {"method": "unified", "target_speedup": 1.0},
    "kv_compression": "int8",
    "sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 4096},
}
REAL = {
    "token_pruning": {"method": "fastv", "keep": 0.5, "layer": 2},
    "layer_skipping": {"method": "unified", "target_speedup": 1.4},
    "kv_compression": "int8",
    "sparse_attention": {"method": "streaming_llm", "sinks": 2, "window": 12},
}
METHOD = {
    "token_pruning": "fastv",
    "layer_skipping": "unified",
    "kv_compression": "int8",
    "sparse_attention": "streaming_llm",
}
SUBSETS = [tuple(f for f, on in zip(NEUTRAL, bits, strict=True) if on) for bits in product((False, True), repeat=4)]


@pytest.mark.parametrize("families", SUBSETS, ids=lambda families: "+".join(families) or "none")
def test_neutral_parameters_compose_to_the_exact_model(families):
    eager, fast = compiled("llama", layers=4, options={family: NEUTRAL[family] for family in families})
    inputs = prompt(2, 20, padding=(0, 3))
    assert torch.equal(greedy(fast, inputs, 16), greedy(eager, inputs, 16))
    assert phases(fast) == ["prefill", "decode"]


@pytest.mark.parametrize("families", SUBSETS, ids=lambda families: "+".join(families) or "none")
def test_real_parameters_all_fire_and_free_what_they_promise(families):
    eager, fast = compiled("llama", layers=4, options={family: REAL[family] for family in families})
    inputs = prompt(2, 200, padding=(0, 30))
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        got, exact = fast.generate(**inputs, **arguments), eager.generate(**inputs, **arguments)
    report = torchaccel.report(fast)
    assert set(report.effective) == {METHOD[family] for family in families} and not report.declines
    assert phases(fast) == ["prefill", "decode"]
    cache = got.past_key_values
    assert all(
        layer.keys.shape == theirs.keys.shape
        for layer, theirs in zip(cache.layers, exact.past_key_values.layers, strict=True)
    )
    # float32 tokens: 2 rows x 2 heads x 16 channels x 4 bytes, keys and values, 4 layers, up to 25 % slack and blocks.
    share = 1.0
    if "kv_compression" in families:
        share *= (1 + 4 * 64 / 200) / 4 + 0.1
    if "layer_skipping" in families:
        share *= 3 / 4
    if "token_pruning" in families:
        share *= 3 / 4 + 0.05
    full = torchaccel.kv_bytes(exact.past_key_values)
    assert torchaccel.kv_bytes(cache) <= full * min(1.3 * share + 0.25, 1.5)
    assert got.sequences.shape == exact.sequences.shape
    if not families:
        assert torch.equal(got.sequences, exact.sequences)


def test_a_neutral_window_changes_nothing_behind_token_pruning():
    """Later passes must see what the earlier ones made of the graph: the pruned mask, not the captured one."""
    inputs = prompt(2, 60, padding=(0, 20))
    pruning = {"token_pruning": REAL["token_pruning"]}
    _, pruned = compiled("llama", layers=4, options=pruning)
    _, both = compiled("llama", layers=4, options={**pruning, "sparse_attention": NEUTRAL["sparse_attention"]})
    assert torch.equal(greedy(both, inputs, 12), greedy(pruned, inputs, 12))
