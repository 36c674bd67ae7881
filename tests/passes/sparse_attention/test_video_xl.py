"""Video-XL-2's prefill against a mask over eager attention, and the worked example of its specification."""

import pytest
import torch
from torchaccel.kernels.prompt_selectors.static import ChunkedBlocks
from torchaccel.kernels.spec import AttentionSpec, KVFormat

import torchaccel
from tests.e2e.generation import compiled, prompt
from tests.passes.static_reference import assert_exact, assert_generation_equals_the_rule
from torchaccel.errors import OptionsError
from torchaccel.options import resolve

TOKENS = 500
METHOD = {"method": "video_xl", "chunk": 128, "previous": 1, "prefix": 1, "question": 3}


def chunked(layer, head, first, query, key, new):
    """Prefix and question are rounded up to blocks of 64."""
    if new == 1 or query // 64 >= (TOKENS - 3) // 64 or key // 64 == first // 64:
        return True
    begin = first // 64 * 64 + 64
    return (query - begin) // 128 - (key - begin) // 128 <= 1


def test_generation_equals_the_masked_reference():
    fast = assert_generation_equals_the_rule(METHOD, chunked, tokens=TOKENS, padding=(0, 70))
    report = torchaccel.report(fast)
    assert report.effective == {"video_xl": {"prefill": 3}} and 0 < report.density < 1


def test_capped_scores_and_layers_with_windows_of_their_own():
    def rule(layer, *pair):
        return layer % 2 == 0 or chunked(layer, *pair)

    with pytest.warns(UserWarning, match="video_xl left 2 site.*already attends to a sliding window"):
        assert_generation_equals_the_rule(
            METHOD,
            rule,
            tokens=TOKENS,
            padding=(0, 6),
            new=24,
            family="gemma2",
            strict=False,
            attn_logit_softcapping=2.0,
        )


def test_exact_when_everything_is_read():
    assert_exact({"method": "video_xl", "chunk": 64, "previous": 9}, tokens=300)


def test_short_prompts_are_dense_bit_for_bit():
    _, exact = compiled("llama")
    _, fast = compiled("llama", options={"sparse_attention": METHOD})
    with torch.no_grad():
        for tokens in (42, 323, 448):
            ids = prompt(1, tokens)["input_ids"]
            expected, got = (model(ids, use_cache=True, logits_to_keep=1).logits for model in (exact, fast))
            # The last tokens read everything, but what they read of a cut prompt differs.
            assert torch.equal(expected, got) == (tokens <= 323)
    assert {site.sparse_from for site in torchaccel.report(fast).records[0].sites} == {324}


@pytest.mark.parametrize(("previous", "pairs"), [(0, 45), (1, 65), (3, 93), (5, 105)])
def test_worked_example(previous, pairs):
    """A prefix of 1, six chunks of 2 tokens, a question of 1: of 105 causal pairs so many are read."""
    dense = KVFormat("dense", "float32", 4)
    spec = AttentionSpec("prefill", 4, 1, "float32", dense, dense, 1.0)
    q = torch.full((2, 1, 16, 4), torch.nan)
    selector = ChunkedBlocks(1, 2, previous, 1, 1)
    lists = selector.select(spec, q, q, torch.tensor([2, 14]))
    assert (lists >= 0).sum((1, 2, 3)).tolist() == [pairs, 3]
    assert selector.share(14) == 1 or pairs < 105


def test_a_chunk_is_a_number_of_blocks():
    with pytest.raises(OptionsError, match="multiple of block"):
        resolve({"sparse_attention": {"method": "video_xl", "chunk": 100}})
