"""Ada-KV: the heads of a layer share one budget, and each keeps as many tokens as it wins among all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, RaggedEviction

from .evicting import EvictingMethod, EvictingOptions
from .expected_attention import ExpectedAttention
from .h2o import H2O
from .pyramidkv import PyramidKV
from .snapkv import SnapKV

SCORERS: dict[str, type[EvictingMethod]] = {
    method.name: method for method in (SnapKV, PyramidKV, ExpectedAttention, H2O)
}
# What Ada-KV sets differently from the methods it takes its scores from.
DEFAULTS: dict[str, dict[str, Any]] = {name: {"kernel": 7, "pooling": "max"} for name in (SnapKV.name, PyramidKV.name)}


class AdaKVOptions(EvictingOptions):
    """The budget is the mean over a layer's KV heads. scorer: the method that scores tokens, by name or with options of
    its own; its budget is this one. alpha: share of the mean that every head has for certain. normalize: whether a
    head's scores are weighted with how much of their sum its best tokens have."""

    default_budget: ClassVar[Budget] = Budget(tokens=512)

    scorer: str | dict[str, Any] = Field(default=SnapKV.name, validate_default=True)
    alpha: float = Field(default=0.2, ge=0.0, le=1.0)
    normalize: bool = False

    @field_validator("scorer")
    @classmethod
    def _known(cls, value: str | dict[str, Any]) -> dict[str, Any]:
        given = {"method": value} if isinstance(value, str) else value
        method = SCORERS.get(given.get("method", ""))
        if method is None:
            raise ValueError(f"scorer is one of {', '.join(SCORERS)}, or {{'method': one of them, ...}}")
        own = {name: item for name, item in given.items() if name != "method"}
        taken = sorted({"layers", *asdict(Budget())} & own.keys())
        if taken:
            raise ValueError(f"{' and '.join(taken)} are options of adakv, not of its scorer")
        chosen = method.Options(**{**DEFAULTS.get(method.name, {}), **own})
        kept = chosen.model_dump(exclude={"layers", *asdict(Budget())})
        return {"method": method.name, **kept}


@dataclass(frozen=True)
class AdaKVPolicy(RaggedEviction):
    """Tokens that the scorer keeps for certain stay in every head; the heads compete for the rest of the budget."""

    budget: Budget
    scorer: Eviction
    alpha: float = 0.2
    normalize: bool = False

    @property
    def last_queries(self) -> int:  # type: ignore[override]
        return self.scorer.last_queries

    @property
    def prompt_mass(self) -> bool:  # type: ignore[override]
        return self.scorer.prompt_mass

    @property
    def unrotated(self) -> bool:  # type: ignore[override]
        return self.scorer.unrotated

    def kept(self, prompt: Prompt) -> Tensor:
        valid = prompt.valid[:, None].expand(prompt.keys.shape[:3])
        scores = self.scorer.score(prompt)
        budgets = self.budgets(prompt)
        # Of what is kept for certain the newest tokens, where a row's budget is smaller than that.
        safe = (scores == torch.inf) & valid
        safe = safe & (safe.flip(-1).cumsum(-1).flip(-1) <= budgets[:, None, None])
        rivals = valid & ~safe & (scores != torch.inf)
        base = budgets - safe.sum(-1).amax(1)
        return safe | won(scores, rivals, base, self.alpha, self.normalize)

    def budgets(self, prompt: Prompt) -> Tensor:
        """Tokens per KV head of each row, int64 ``[B]``: padding is no part of a row's length."""
        keys = prompt.keys
        lengths = prompt.valid.sum(-1).tolist()
        found = [self.scorer.capacity(replace(prompt, keys=keys[:, :, keys.shape[2] - n :])) for n in lengths]
        return torch.tensor(found, device=keys.device)


def won(scores: Tensor, rivals: Tensor, base: Tensor, alpha: float, normalize: bool = False) -> Tensor:
    """Which tokens each head keeps of its ``rivals`` bool ``[B, H, S]``, by ``scores`` ``[B, H, S]``: bool like them.

    base: int64 ``[B]``, tokens per head on average. Each head's number is the part ``1 - alpha`` of what it wins among
    the best ``H * base`` of a row, and ``alpha`` of the average.
    """
    heads = scores.shape[1]
    scores = scores.float().masked_fill(~rivals, -torch.inf)
    of_head = rank(scores)
    if normalize:
        mass = scores.clamp(min=0)
        best = torch.where(of_head < base[:, None, None], mass, 0).sum(-1, keepdim=True)
        scores = scores * (best / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
    winners = (rank(scores.flatten(1)) < heads * base[:, None]).view_as(rivals) & rivals
    numbers = (winners.sum(-1) * (1 - alpha) + (base * alpha).floor()[:, None]).round()
    return rivals & (of_head < numbers[..., None])


def rank(scores: Tensor) -> Tensor:
    """Place of every score ``[..., n]`` among the n, the largest first; of equal ones the earlier."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


class AdaKV(EvictingMethod):
    """After the prompt KV heads keep different numbers of tokens, those with broad attention more; then it grows."""

    name = "adakv"
    paper = "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference (2024)"
    Options = AdaKVOptions

    options: AdaKVOptions

    def policy(self) -> AdaKVPolicy:
        given = self.options.scorer
        assert isinstance(given, Mapping)
        method = SCORERS[given["method"]]
        own = {name: value for name, value in given.items() if name != "method"}
        budget = {name: value for name, value in asdict(self.options.budget).items() if value is not None}
        scorer = method(method.Options(**own, **budget)).policy()
        return AdaKVPolicy(scorer=scorer, **self.settings("alpha", "normalize"))
