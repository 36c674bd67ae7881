"""MInference: equal to the model with the mask of each head's pattern, and exact where everything is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchaccel.kernels.spec import AttentionSpec, KVFormat
from torchaccel.passes.sparse_attention.minference import CANDIDATES, MInference, search_patterns

import torchaccel
from tests.passes.sparse_attention.prompt_reference import (
    assert_equal_to_the_masked_model,
    assert_exact_when_everything_is_read,
    causal_weights,
    from_lines,
)

BLOCK, VERTICAL, SLASH = 64, 32, 103
OPTIONS = {"method": "minference", "block": BLOCK, "vertical": VERTICAL, "slash": SLASH}


def vertical_slash_blocks(q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
    tokens = q.shape[0]
    rows = list(range(tokens - 64, tokens))
    weights = causal_weights(q, k, first, scale, rows)
    vertical, slash = weights.sum(0), torch.full((tokens,), -1.0)
    vertical[:first], vertical[first : first + 30] = -1, torch.inf
    for offset in range(tokens - first):
        slash[offset] = sum(weights[i, t - offset] for i, t in enumerate(rows) if t >= offset)
    slash[:100] = torch.inf
    columns = {j // BLOCK for j in vertical.topk(VERTICAL).indices.tolist()}
    diagonals = set()
    for offset in slash.topk(SLASH).indices.tolist():
        # Keys of the block of queries that starts at i: i - offset .. i - offset + BLOCK - 1.
        diagonals |= {offset // BLOCK, (offset + BLOCK - 1) // BLOCK}
    return from_lines(columns, diagonals, first, -(-tokens // BLOCK), BLOCK)


def test_equals_the_model_with_the_mask_of_the_paper():
    fast = assert_equal_to_the_masked_model(OPTIONS, vertical_slash_blocks, BLOCK, 460)
    assert not torchaccel.report(fast).declines and torchaccel.report(fast).density < 1


def test_exact_when_every_column_is_read():
    assert_exact_when_everything_is_read({**OPTIONS, "vertical": 300})


def site(layer: int, heads: int = 4) -> SimpleNamespace:
    cache = SimpleNamespace(kind="fresh", window=None)
    return SimpleNamespace(name=f"layers.{layer}", layer=layer, index=layer, heads=heads, key_cache=cache)


def test_a_published_plan_names_a_pattern_for_every_head():
    plan = [
        {"0": ["stream_llm", 100, 800, 1], "2": ["block_sparse", 100, 800, 0.98]},
        {"3": ["vertical_and_slash", 500, 700, 1], "4": ["vertical_and_slash", 1, 1, 1]},
    ]
    method = MInference(MInference.Options(vertical=10, slash=20, plan=plan))
    usual = ("vertical_and_slash", 10, 20)
    assert method.selector(site(0)).heads == (("a_shape", 100, 800), usual, ("block_sparse", 100, 800), usual)
    assert method.selector(site(1, 5)).heads[3:] == (("vertical_and_slash", 500, 700), ("vertical_and_slash", 1, 1))
    assert method.selector(site(2)).heads == (usual,)
    assert method.refuse(site(1, 5)) is None
    assert "head 4 of 4" in str(method.refuse(site(1)))
    with pytest.raises(ValueError, match="vertical_and_slash"):
        MInference.Options(plan=[{"0": ["diagonal", 1, 1, 1]}])


def test_the_search_finds_what_each_head_looks_at():
    """Head 0 looks at a few far columns, head 1 only at what is near: the band and the short diagonals hold it all."""
    torch.manual_seed(0)
    dense = KVFormat("dense", "float32", 32)
    spec = AttentionSpec("prefill", 32, 1, "float32", dense, dense, 1.0)
    tokens = 4096
    q, k = (torch.randn(1, 2, tokens, 32) * 0.1 for _ in range(2))
    q[0, 0, :, 0], k[0, 0, 300::512, 0] = 8, 8
    angles = torch.arange(tokens)[:, None] * torch.tensor([0.002, 0.01, 0.05, 0.25])
    near = torch.cat([angles.cos(), angles.sin()], 1) * 6
    q[0, 1, :, :8] = k[0, 1, :, :8] = near
    found = search_patterns(spec, q, k)
    assert found[0][0] == "vertical_and_slash" and found[0] in CANDIDATES
    assert found[1] in CANDIDATES and found[1] != ("vertical_and_slash", 3500, 100)
    assert search_patterns(spec, q, k, candidates=(("a_shape", 1, 1), ("a_shape", 64, 2048)))[1] == (
        "a_shape",
        64,
        2048,
    )
