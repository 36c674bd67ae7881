"""A prompt that is run once and repeated: every row goes on as in eager, and the prompt is stored and read once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, phases, prompt
from torchaccel.runtime.kv import LogicalKV
from torchaccel.runtime.storage import grown

PROMPT, ROWS = 200, 6


def continued(model: Any, stages: list[tuple[dict[str, Tensor], int]], tokens: int) -> tuple[Tensor, DynamicCache]:
    """Greedy ids after running each stage's inputs and repeating every row; the last stage has other first tokens."""
    cache = DynamicCache(config=model.config)
    ids = mask = None
    with torch.no_grad():
        for inputs, times in stages:
            new, seen = inputs["input_ids"], inputs["attention_mask"]
            ids = new if ids is None else torch.cat([ids, new], 1)
            mask = seen if mask is None else torch.cat([mask, seen], 1)
            model(new, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(times)
            ids, mask = ids.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)
        first = torch.arange(10, 10 + ids.shape[0])[:, None]
        ids, mask = torch.cat([ids, first], 1), torch.cat([mask, torch.ones_like(first)], 1)
        arguments = {"past_key_values": cache, "max_new_tokens": tokens, "do_sample": False}
        return model.generate(ids, attention_mask=mask, **arguments), cache


def caches(model: Any) -> list[str]:
    """What the report says of every attention site's cache in the decode graphs."""
    return [site.layout for r in torchaccel.report(model).records if r.phase == "decode" for site in r.sites]


def stepped(model: Any, cache: DynamicCache, steps: int, seed: int = 2) -> list[Tensor]:
    """Logits of steps with random tokens."""
    rows = cache.layers[0].keys.shape[0]
    found = []
    with torch.no_grad():
        for token in prompt(rows, steps, seed=seed)["input_ids"].split(1, dim=1):
            mask = torch.ones(rows, cache.layers[0].keys.shape[2] + 1, dtype=torch.int64)
            found.append(model(token, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_generation_equals_eager_and_stores_the_prompt_once(family: str) -> None:
    eager, fast = compiled(family, layers=2)
    stages = [(prompt(1, PROMPT), ROWS)]
    want, _ = continued(eager, stages, 24)
    got, cache = continued(fast, stages, 24)
    assert torch.equal(got, want) and len({tuple(row) for row in got[:, PROMPT:].tolist()}) == ROWS
    assert phases(fast) == ["prefill", "decode"] and not torchaccel.report(fast).declines
    assert caches(fast) == [f"dense, shared prefix of {ROWS} rows"] * 2
    assert f"shared prefix of {ROWS}" in str(torchaccel.report(fast))
    token = 2 * 2 * 16 * 4  # keys and values of two heads
    assert torchaccel.kv_bytes(cache) == 2 * token * (grown(PROMPT) + ROWS * 64)
    assert torchaccel.report(fast).records[-1].counter.kv_bytes == torchaccel.kv_bytes(cache)
    for layer in cache.layers:
        assert isinstance(layer.keys, LogicalKV) and layer.keys.shape[2] == PROMPT + 24


def test_lengths_and_batches_do_not_recompile_more_than_without_sharing() -> None:
    eager, fast = compiled("llama", layers=1)
    for length, rows, tokens, graphs in ((PROMPT, 3, 2, 1), (333, 3, 80, 1), (150, 5, 3, 2), (170, 9, 3, 2)):
        stages = [(prompt(1, length, seed=length), rows)]
        assert torch.equal(continued(fast, stages, tokens)[0], continued(eager, stages, tokens)[0])
        assert phases(fast).count("decode") == graphs


def test_left_padded_prompts_are_shared_by_their_rows() -> None:
    eager, fast = compiled("llama", layers=2)
    stages = [(prompt(2, PROMPT, padding=(0, 77)), 3)]
    want, _ = continued(eager, stages, 12)
    got, cache = continued(fast, stages, 12)
    assert torch.equal(got, want)
    assert caches(fast) == ["dense, shared prefix of 3 rows"] * 2
    assert [prefix.entries for prefix in cache.layers[0].keys.physical.prefixes] == [2]


def test_prefixes_within_prefixes_and_rows_that_are_reordered() -> None:
    """A prompt for all, 130 more tokens for each half, six continuations; then a beam search's choice of rows."""
    eager, fast = compiled("llama", layers=2)
    stages = [(prompt(1, PROMPT, padding=(9,)), 2), (prompt(2, 130, seed=1), 3)]
    found = []
    for model in (eager, fast):
        ids, cache = continued(model, stages, 10)
        logits = []
        for rows in ([2, 0, 1, 4, 4, 3], [0, 3, 1, 2, 5, 4]):
            cache.batch_select_indices(torch.tensor(rows))
            logits += stepped(model, cache, 2)
        found.append((ids, logits))
    assert torch.equal(found[0][0], found[1][0])
    for want, got in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=5e-5)
    # The first choice keeps to the groups; the second mixes them, and from then on every row has a copy.
    assert list(dict.fromkeys(caches(fast))) == ["dense, shared prefix of 6 and of 3 rows", "dense"]
    assert torchaccel.report(fast).declines == ["decode: shared prefix: rows of different prefixes were mixed"]


def test_what_a_layer_cannot_share_it_copies_and_says_so() -> None:
    eager, fast = compiled("mistral", layers=1, sliding_window=150)
    found = []
    for model in (eager, fast):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**prompt(1, 140), past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(3)
            tokens = prompt(3, 12, seed=2)["input_ids"].split(1, dim=1)
            found.append([model(token, past_key_values=cache, use_cache=True).logits for token in tokens])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=5e-5)
    assert any("keeps a sliding window of 150 tokens" in line for line in torchaccel.report(fast).declines)
    assert not cache.layers[0].keys.kv_layout.prefixes


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"kv_compression": "int8"}, "int8, shared prefix of 3 rows"),
        ({"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 64}}, "dense"),
        ({"token_pruning": {"method": "fastv", "keep": 0.7, "layer": 1}}, "dense pruned"),
    ],
    ids=["int8", "streaming_llm", "fastv"],
)
def test_methods_answer_for_a_repeated_prompt_as_for_copied_ones(options: Any, layout: str) -> None:
    """Whether or not the method's cache can be shared: the first tokens after equal those of three separate prompts."""
    _, fast = compiled("llama", layers=2, options=options)
    inputs = prompt(1, PROMPT)
    copied = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    got, _ = continued(fast, [(inputs, 3)], 4)
    assert layout in caches(fast)
    want, _ = continued(fast, [(copied, 1)], 4)
    assert torch.equal(got, want)
    declined = " ".join(torchaccel.report(fast).declines)
    assert ("shared" in layout) != ("read copies" in declined or "pruned tokens are not shared" in declined)
