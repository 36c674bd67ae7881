"""LoopServe's prefill: equal to the model with the mask of its lines, and exact where everything is covered."""

from __future__ import annotations

import torch
from torch import Tensor

import torchaccel
from tests.passes.sparse_attention.prompt_reference import (
    assert_equal_to_the_masked_model,
    assert_exact_when_everything_is_read,
    causal_weights,
    from_lines,
)

BLOCK, ALPHA, RECENT, SAMPLED, SEED = 64, 0.6, 10, 12, 3
OPTIONS = {
    "method": "loopserve", "block": BLOCK, "alpha": ALPHA, "recent": RECENT, "sampled": SAMPLED, "seed": SEED
}  # fmt: skip


def covering_blocks(q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
    tokens = q.shape[0]
    blocks, earlier = -(-tokens // BLOCK), tokens - RECENT
    places = torch.rand(SAMPLED, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).tolist()
    rows = [first + int((i + place) / SAMPLED * (earlier - first)) for i, place in enumerate(places)]
    rows += range(earlier, tokens)
    weights = causal_weights(q, k, first, scale, rows)
    left = {
        (t // BLOCK, i, j): weights[i, j * BLOCK : (j + 1) * BLOCK].sum().item()
        for i, t in enumerate(rows)
        for j in range(t // BLOCK + 1)
    }
    total, taken = sum(left.values()), []
    lines = [("column", j) for j in range(blocks)] + [("diagonal", d) for d in range(blocks)]
    line = ("diagonal", 0)
    while True:
        taken.append(line)
        left = {(own, i, j): x for (own, i, j), x in left.items() if line not in (("column", j), ("diagonal", own - j))}
        if total - sum(left.values()) >= ALPHA * total:
            break
        gains = dict.fromkeys(lines, 0.0)
        for (own, _, j), x in left.items():
            gains["column", j] += x
            gains["diagonal", own - j] += x
        line = max(lines, key=lambda item: gains[item])
    columns, diagonals = ({n for kind, n in taken if kind == name} for name in ("column", "diagonal"))
    return from_lines(columns, diagonals, first, blocks, BLOCK)


def test_equals_the_model_with_the_mask_of_its_lines():
    fast = assert_equal_to_the_masked_model(OPTIONS, covering_blocks, BLOCK, 400)
    assert not torchaccel.report(fast).declines and torchaccel.report(fast).density < 1


def test_exact_when_alpha_is_everything():
    assert_exact_when_everything_is_read({**OPTIONS, "alpha": 1.0})
