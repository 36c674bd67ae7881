"""LongGen against a mask over eager attention, in both patterns, and the worked examples of its specification."""

import pytest
import torch
from torchaccel.kernels.prompt_selectors.static import StridedBlocks
from torchaccel.kernels.spec import AttentionSpec, KVFormat
from torchaccel.passes.sparse_attention.longgen import LongGenOptions

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt
from tests.passes.static_reference import assert_exact, assert_generation_equals_the_rule
from torchaccel.errors import OptionsError
from torchaccel.options import resolve
from torchaccel.runtime.selection import Call, Sizes
from torchaccel.runtime.strided import StridedSelection

STRIDED = {"method": "longgen", "pattern": "strided", "sinks": 64, "window": 64, "stride": 3}


def window(layer, head, first, query, key, new):
    return layer == 1 or key < first + 2 or query - key < 9


def strided(layer, head, first, query, key, new):
    begin = first // 64
    own, block = query // 64 - begin, key // 64 - begin
    return layer == 1 or block < 1 or own - block < 1 or (block - head) % 3 == 0


def test_windows_equal_the_masked_reference():
    method = {"method": "longgen", "sinks": 2, "window": 9}
    fast = assert_generation_equals_the_rule(method, window, tokens=42, padding=(0, 6))
    assert torchaccel.report(fast).effective["longgen"] == {"prefill": 2, "decode": 2}


def test_strided_blocks_equal_the_masked_reference():
    # Decoding goes over the end of a block, and from 7 blocks to 8.
    fast = assert_generation_equals_the_rule(STRIDED, strided, tokens=401, padding=(0, 70))
    report = torchaccel.report(fast)
    assert report.effective["longgen"] == {"prefill": 2, "decode": 2} and 0 < report.density < 1


def test_capped_scores_and_layers_with_windows_of_their_own():
    def rule(layer, *pair):
        return layer % 2 == 0 or window(0, *pair)

    method = {"method": "longgen", "sinks": 2, "window": 9, "full": 0.0}
    with pytest.warns(UserWarning, match="longgen left 2 site.*already attends to a sliding window"):
        assert_generation_equals_the_rule(
            method, rule, tokens=42, padding=(0, 6), new=8, family="gemma2", strict=False, attn_logit_softcapping=2.0
        )


@pytest.mark.parametrize("method", [{"window": 4096}, {"pattern": "strided", "window": 4096}, {"full": 1.0}])
def test_exact_when_everything_is_read(method):
    assert_exact({"method": "longgen", **method})


def test_short_texts_are_dense_bit_for_bit():
    _, exact = compiled("llama")
    _, fast = compiled("llama", options={"sparse_attention": STRIDED})
    with torch.no_grad():
        for tokens in (42, 128, 129, 300):
            ids = prompt(1, tokens)["input_ids"]
            expected, got = (model(ids, use_cache=True, logits_to_keep=1).logits for model in (exact, fast))
            # Two blocks are sink and own; stride 3 reads all of three in one head.
            assert torch.equal(expected, got) == (tokens <= 128)
    assert torchaccel.report(fast).graphs <= 2


def test_bfloat16_generates():
    _, fast = compiled("llama", dtype=torch.bfloat16, options={"sparse_attention": STRIDED, "strict": True})
    assert greedy(fast, prompt(2, 401, padding=(0, 6)), 4).shape == (2, 405)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_strided_blocks_of_one_phase(phase):
    """The other phase stays as it is, bit for bit."""
    _, exact = compiled("llama")
    _, fast = compiled("llama", options={"sparse_attention": {phase: STRIDED}, "strict": True})
    inputs = prompt(1, 401)
    found = []
    with torch.no_grad():
        for model in (exact, fast):
            first = model(**inputs, use_cache=True)
            step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": first.past_key_values}
            found.append((first.logits, model(**step, use_cache=True).logits))
    (prompts, steps), (got, then) = found
    assert torch.equal(prompts, got) == (phase == "decode")
    layouts = [layer.keys.physical.layout for layer in first.past_key_values.layers]
    assert [layout.selection is not None for layout in layouts] == [phase == "decode", False, phase == "decode"]
    assert phase == "prefill" or not torch.equal(steps, then)


def test_the_middle_third_is_full():
    def full(count, **options):
        return sorted(set(range(count)) - LongGenOptions(**options).select(count))

    assert full(12) == [4, 5, 6, 7] and full(32) == list(range(10, 21)) and full(24) == list(range(8, 16))
    assert full(3, full=0.0) == [] and full(3, full=1.0) == [0, 1, 2]
    assert full(4, layers=(0, -1)) == [1, 2]


def test_a_window_has_no_stride():
    with pytest.raises(OptionsError, match="the pattern 'window' has no stride"):
        resolve({"sparse_attention": {"method": "longgen", "stride": 4}})


def test_worked_example_of_blocks():
    """Blocks of one token, stride 3, sink 1, local 1: token 7 sees 0, 3, 6 and 7 in the first head."""
    policy = StridedSelection(1, 1, 1, 3)
    state = policy.allocate(Sizes(2, 3, 8, 4, torch.float32), torch.device("cpu"))
    state["first"][1] = 2
    keys, q = torch.full((2, 3, 1, 4), torch.nan), torch.full((2, 6, 1, 4), torch.nan)
    lists = policy.choose(state, Call(q, keys, torch.tensor([0, 7, 7])))
    assert lists.shape == (2, 3, policy.width(state))
    found = [[sorted(x for x in row if x >= 0) for row in rows] for rows in lists.tolist()]
    # The second row begins at token 2.
    assert found == [[[0, 3, 6, 7], [0, 1, 4, 7], [0, 2, 5, 7]], [[2, 5, 7], [2, 3, 6, 7], [2, 4, 7]]]
    dense = KVFormat("dense", "float32", 4)
    spec = AttentionSpec("prefill", 4, 2, "float32", dense, dense, 1.0)
    q, k = torch.full((2, 6, 8, 4), torch.nan), torch.full((2, 3, 8, 4), torch.nan)
    prompt_lists = StridedBlocks(1, 1, 1, 3).select(spec, q, k, state["first"])
    last = [[[x for x in row if x >= 0] for row in rows[::2]] for rows in prompt_lists[:, :, 7].tolist()]
    assert last == found
