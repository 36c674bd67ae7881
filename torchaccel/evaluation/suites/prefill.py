"""A prompt over itself: dense and causal, and 15 % of it by a list of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contender import Contender, Goal, Scenario
from .geometry import Geometry

BLOCK = 128
DENSITY = 0.15
COMPARED = 128


def scenario(g: Geometry, *, flex: bool) -> Scenario:
    """Causal attention of ``g.prefill`` tokens."""
    q, k, v = (g.normal(1, heads, g.prefill) for heads in (g.heads, g.kv_heads, g.kv_heads))
    pairs = g.prefill * (g.prefill + 1) / 2
    flops = 4.0 * g.heads * pairs * g.head_dim
    size = float(2 * q.nbytes + k.nbytes + v.nbytes)
    scale = g.head_dim**-0.5
    sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    found = [Contender("sdpa", [sdpa], size, flops)]
    if flex:
        found.append(Contender("flex", [_flex(g, q, k, v, scale)], size, flops))
    dense = g.seed(g.spec("prefill"))
    found.append(Contender("torchaccel:exact", [lambda: dense(q, k, v, None)], size, flops))
    index = _lists(g)
    share = _share(index, g.prefill)
    blocks = g.seed(g.spec("prefill", index="blocks", index_block=BLOCK))
    found.append(
        Contender("torchaccel:blocks", [lambda: blocks(q, k, v, None, index)], size, flops * share, density=share)
    )
    truth = _truth(q, k, v, scale)
    for contender in found:
        result: Any = contender.calls[0]()
        contender.error = float((result[:, :, -COMPARED:].float() - truth).abs().max())
    return Scenario(f"prefill {g.prefill}", found, lambda _: _goals(share), 5)


def _goals(share: float) -> Sequence[Goal]:
    return [
        Goal("torchaccel:exact", "times sdpa", 1.7, lambda ms: ms["sdpa"] / ms["torchaccel:exact"]),
        Goal(
            "torchaccel:blocks",
            "of dense speed over density",
            0.75,
            lambda ms: ms["torchaccel:exact"] * share / ms["torchaccel:blocks"],
        ),
    ]


def _lists(g: Geometry) -> Tensor:
    """For every block of queries its own block, the first one, and random ones: int32 ``[1, H, QB, width]``."""
    count = -(-g.prefill // BLOCK)
    width = max(2, round(DENSITY * (count + 1) / 2) + 2)
    index = torch.full((1, g.heads, count, width), -1, dtype=torch.int32, device=g.device)
    for head in range(g.heads):
        for row in range(count):
            # As many in every row: early rows see fewer blocks, so late ones take more than their share.
            wanted = min(row + 1, max(2, round(DENSITY * (row + 1)) + 1), width)
            others = torch.randperm(max(0, row - 1))[: max(0, wanted - 2)] + 1
            entries = sorted({0, row, *others.tolist()})[:width]
            index[0, head, row, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
    return index


def _share(index: Tensor, tokens: int) -> float:
    """Pairs that the lists leave, over all causal pairs: the own block counts half."""
    count = index.shape[2]
    own = index == torch.arange(count, device=index.device)[None, None, :, None]
    visited = ((index >= 0).sum() - 0.5 * own.sum()).item() / index.shape[1]
    return visited * BLOCK * BLOCK / (tokens * (tokens + 1) / 2)


def _truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of the last queries, in float32."""
    mask = torch.ones(COMPARED, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - COMPARED)
    return F.scaled_dot_product_attention(
        q[:, :, -COMPARED:].float(), k.float(), v.float(), mask, scale=scale, enable_gqa=True
    )


def _flex(g: Geometry, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def past(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(past, None, None, g.prefill, g.prefill, device=g.device.type)
    run = torch.compile(flex_attention, dynamic=False)
    return partial(run, q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
