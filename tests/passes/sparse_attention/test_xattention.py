"""XAttention: equal to the model with the mask of the paper's selection, and exact where everything is read."""

from __future__ import annotations

import torch
from torch import Tensor

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.sparse_attention.prompt_reference import (
    assert_equal_to_the_masked_model,
    assert_exact_when_everything_is_read,
)

BLOCK, STRIDE, THRESHOLD = 64, 8, 0.6
OPTIONS = {"method": "xattention", "block": BLOCK, "stride": STRIDE, "threshold": THRESHOLD}


def antidiagonal_blocks(q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
    tokens, each = q.shape[0], BLOCK // STRIDE
    blocks = -(-tokens // BLOCK)
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, blocks * BLOCK - tokens)) for x in (q, k))
    q[:first], k[:first] = 0, 0
    groups, low, high = blocks * each, first // STRIDE, -(-tokens // STRIDE)
    mass = torch.zeros(groups, groups)
    for a in range(low, high):
        scores = [
            sum(q[a * STRIDE + STRIDE - 1 - j] @ k[b * STRIDE + j] for j in range(STRIDE)) for b in range(low, a + 1)
        ]
        mass[a, low : a + 1] = torch.softmax(torch.stack(scores) * scale / STRIDE, -1)
    mass = mass.unflatten(0, (blocks, each)).sum(1).unflatten(1, (blocks, each)).sum(2)
    read = torch.zeros(blocks, blocks, dtype=torch.bool)
    start = first // BLOCK
    for i in range(start, blocks):
        chosen = {start, i}
        for j in mass[i].argsort(descending=True).tolist():
            if mass[i, list(chosen)].sum() >= THRESHOLD * mass[i].sum():
                break
            chosen.add(j)
        read[i, list(chosen)] = True
    return read


def test_equals_the_model_with_the_mask_of_the_paper():
    fast = assert_equal_to_the_masked_model(OPTIONS, antidiagonal_blocks, BLOCK)
    report = torchaccel.report(fast)
    assert not report.declines and 0 < report.density < 1
    assert {site.sparse_from for site in report.records[0].sites} == {3 * BLOCK + 1}
    assert "from 193 tokens" in str(report)


def test_exact_when_the_threshold_is_everything():
    assert_exact_when_everything_is_read({**OPTIONS, "threshold": 1.0})


def test_short_prompts_are_dense_bit_for_bit_and_growing_ones_compile_once():
    _, exact = compiled("llama")
    _, fast = compiled("llama", options={"sparse_attention": OPTIONS})
    with torch.no_grad():
        for tokens in (100, 180, 192, 250, 400, 701):
            ids = prompt(1, tokens)["input_ids"]
            expected, got = (model(ids, use_cache=True, logits_to_keep=1).logits for model in (exact, fast))
            assert torch.equal(expected, got) == (tokens <= 3 * BLOCK)
    assert phases(fast) == phases(exact)
    assert torchaccel.report(fast).graphs <= 2


def test_bfloat16_and_quantised_caches():
    options = {"sparse_attention": OPTIONS, "kv_compression": "int8"}
    _, fast = compiled("llama", dtype=torch.bfloat16, options=options)
    inputs = prompt(2, 300, padding=(0, 75))
    assert greedy(fast, inputs, 4).shape == (2, 304)
    report = torchaccel.report(fast)
    assert {site.layout for site in report.records[0].sites} == {"int8"} and report.density < 1


def test_the_attention_that_tokens_receive_is_that_of_the_blocks_read():
    """H2O adds it up in the prompt: with lists of everything it keeps what it keeps by itself."""
    h2o = {"kv_compression": {"method": "h2o", "tokens": 64}}
    _, alone = compiled("llama", options=h2o)
    _, both = compiled("llama", options={**h2o, "sparse_attention": {**OPTIONS, "threshold": 0.99999}})
    inputs = prompt(1, 300)
    assert torch.equal(greedy(alone, inputs, 4), greedy(both, inputs, 4))


def test_a_model_without_a_cache_is_sparse_too():
    _, fast = compiled("llama", options={"sparse_attention": OPTIONS})
    with torch.no_grad():
        fast(prompt(1, 300)["input_ids"], use_cache=False)
    assert torchaccel.report(fast).density < 1


def test_with_a_method_for_what_follows_the_prompt():
    later = {"method": "streaming_llm", "sinks": 4, "window": 16}
    _, fast = compiled("llama", options={"sparse_attention": {"prefill": OPTIONS, "decode": later}})
    greedy(fast, prompt(1, 300), 4)
    assert torchaccel.report(fast).effective == {"xattention": {"prefill": 3}, "streaming_llm": {"decode": 3}}
