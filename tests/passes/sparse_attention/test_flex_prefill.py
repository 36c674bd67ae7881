"""FlexPrefill: equal to the model with the mask of the paper's selection, and exact where everything is read."""

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

BLOCK, GAMMA, TAU, LEAST = 64, 0.4, 0.215, 64
OPTIONS = {"method": "flex_prefill", "block": BLOCK, "gamma": GAMMA, "tau": TAU, "min_budget": LEAST}


def adaptive_blocks(q: Tensor, k: Tensor, first: int, scale: float, seen: list[bool] | None = None) -> Tensor:
    tokens = q.shape[0]
    blocks, start = -(-tokens // BLOCK), first // BLOCK
    rows = list(range(max(first, tokens - BLOCK), tokens))
    weights = causal_weights(q, k, first, scale, rows)
    vertical, slash = weights.mean(0), torch.zeros(tokens)
    for i, t in enumerate(rows):
        for j in range(first, t + 1):
            slash[t - j] += weights[i, j] / len(rows)

    def budget(scores: Tensor) -> int:
        count = int((scores.sort(descending=True).values.cumsum(0) < GAMMA).sum()) + 1
        return min(max(count // BLOCK + 1, -(-LEAST // BLOCK)), blocks)

    def by_block(x: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in x.split(BLOCK)])

    def best(scores: Tensor, always: int, allowed: range, count: int) -> set[int]:
        ranked = sorted(set(allowed) - {always}, key=lambda j: -scores[j].item())
        return {always, *ranked[: count - 1]}

    spans = {j: slice(max(first, j * BLOCK), min(tokens, (j + 1) * BLOCK)) for j in range(start, blocks)}
    keys = torch.stack([k[span].mean(0) for span in spans.values()])
    queries = torch.stack([q[span].mean(0) for span in spans.values()])
    predicted = torch.softmax(keys @ q[rows].mean(0) * scale, 0)
    true = by_block(vertical)[start:]
    middle = (predicted + true) / 2
    jensen = ((predicted * (predicted / middle).log()).sum() + (true * (true / middle).log()).sum()) / 2
    aware = bool(jensen.sqrt() < TAU)
    if seen is not None:
        seen.append(aware)
    counts = [LEAST // BLOCK] * 2 if aware else [budget(vertical), budget(slash)]
    columns = best(by_block(vertical), start, range(start, blocks), counts[0])
    diagonals = best(by_block(slash), 0, range(blocks - start), counts[1])
    read = from_lines(columns, diagonals, first, blocks, BLOCK)
    if aware:
        live = blocks - start
        pairs = (queries @ keys.T * scale).masked_fill(torch.ones(live, live).triu(1).bool(), -torch.inf).softmax(1)
        held = 0.0
        for place in pairs.flatten().argsort(descending=True).tolist():
            if held >= GAMMA * live:
                break
            held += pairs.flatten()[place].item()
            read[start + place // live, start + place % live] = True
    return read


def test_equals_the_model_with_the_mask_of_the_paper():
    kinds: list[bool] = []
    fast = assert_equal_to_the_masked_model(OPTIONS, lambda *args: adaptive_blocks(*args, kinds), BLOCK, 400)
    assert set(kinds) == {True, False}  # heads of either kind
    assert not torchaccel.report(fast).declines and torchaccel.report(fast).density < 1


def test_exact_when_gamma_is_everything():
    assert_exact_when_everything_is_read({**OPTIONS, "gamma": 1.0})
