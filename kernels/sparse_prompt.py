"""Attention of a prompt over the blocks of keys that a policy chooses from it, and dense where that is less work."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import prompt_selectors, registry
from .plan import Plan
from .prompt_selectors.base import BlockSelector, PromptSelector
from .spec import AttentionSpec


@dataclass(frozen=True)
class SparsePrompt:
    """What a compiled graph carries of sparse attention without a cache: who chooses, kernels for lists and for all.

    least: tokens from which choosing pays; fewer, and those of which everything would be read, run ``dense``.
    """

    selector: BlockSelector
    sparse: Plan
    dense: Plan
    least: int = 0

    def runs_dense(self, tokens: int) -> bool:
        """Whether ``tokens`` tokens attend to everything, without a choice."""
        return tokens < self.least or self.selector.share(tokens) >= 1

    def switch(self) -> int | None:
        """The least number of tokens that runs sparse, of all up to a million; None where there is none."""
        low, high = 0, 2**20
        if self.runs_dense(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.runs_dense(middle) else (low, middle)
        return high

    def key(self) -> str:
        """Canonical JSON: the string that the operator carries."""
        fields = {
            "selector": self.selector.key(),
            "sparse": self.sparse.key(),
            "dense": self.dense.key(),
            "least": self.least,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> SparsePrompt:
        """The plan whose ``key()`` is ``key``."""
        fields = json.loads(key)
        return SparsePrompt(
            prompt_selectors.from_key(fields["selector"]),
            Plan.from_key(fields["sparse"]),
            Plan.from_key(fields["dense"]),
            fields["least"],
        )


def listed(spec: AttentionSpec, selector: BlockSelector) -> AttentionSpec:
    """The attention of ``spec`` over the blocks that ``selector`` lists; no later ones than the queries' if causal."""
    return replace(spec, causal=selector.causal, index="blocks", index_block=selector.block)


def attend(plan: SparsePrompt, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, Tensor]:
    """What the kernel returns, and the share of causal block pairs that it read, a float32 scalar.

    q: ``[B, H, S, D]``. k, v: ``[B, H_kv, S, D]``. mask: that of the attention, or None. The share is of live tokens.
    """
    tokens = k.shape[2]
    if plan.runs_dense(tokens):
        return registry.attend_prompt(plan.dense.key())(q, k, v, mask), q.new_ones((), dtype=torch.float32)
    first = first_live(mask, q.shape[0])
    spec, selector = plan.sparse.spec, plan.selector
    assert isinstance(selector, PromptSelector)
    index = selector.select(spec, q, k, first)
    results = registry.attend_prompt(plan.sparse.key())(q, k, v, mask, index)
    return results, share_read(index, first, selector.block)


def first_live(mask: Tensor | None, batch: int) -> Tensor | None:
    """First token of every row that sees itself, int64 ``[B]``: the end of its left padding; None without a mask.

    Not what the last token sees: of packed sequences that would be the start of the last one.
    """
    if mask is None:
        return None
    itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    live = itself if mask.dtype == torch.bool else itself > torch.finfo(mask.dtype).min / 2
    return live.int().argmax(-1).expand(batch).contiguous()


def share_read(index: Tensor, first: Tensor | None, block: int) -> Tensor:
    """The part of the causal pairs of live blocks that lists ``[B, H, N, W]`` name; a block's own counts half."""
    batch, heads, blocks, _ = index.shape
    rows = torch.full((batch,), blocks, device=index.device) if first is None else blocks - first // block
    read = (index >= 0).sum() - 0.5 * heads * rows.sum()
    return (read / (0.5 * heads * rows.square().sum())).float()
