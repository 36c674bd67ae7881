"""LOOK-M: text stays, tokens of images go, and what goes is merged into the most similar token that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, protect

from ..base import Decline, PassResult, Reason, RewriteContext
from .evicting import EvictingMethod
from .modality import ImageTokens, ModalityOptions, images

# Tokens compared at a time: of 32k tokens all at once, the similarities would take gigabytes per layer.
BLOCK = 1024


class LookMOptions(ModalityOptions):
    """recent: share of the budget of the most recent tokens. merge: how tokens that go are merged into those that stay.
    merge_keys: whether keys are merged, too; values alone where positions are no plain count (M-RoPE). text_prior: no
    text goes, even where there is more of it than the budget; without, ``sinks`` first tokens stay instead."""

    default_budget: ClassVar[Budget] = Budget(ratio=0.2)

    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    merge: Literal["none", "average", "pivot", "weighted"] = "pivot"
    merge_keys: bool = True
    text_prior: bool = True
    sinks: int = Field(default=4, ge=0, le=4096)


@dataclass(frozen=True)
class LookMPolicy(Eviction):
    """Scores are the attention a token received from the whole prompt, summed over the group's heads."""

    budget: Budget
    recent: float = 0.5
    merging: str = "pivot"
    merge_keys: bool = True
    text_prior: bool = True
    sinks: int = 4
    image_ids: ImageTokens = ()
    prompt_mass: bool = True

    @property
    def token_ids(self) -> bool:  # type: ignore[override]
        return self.text_prior and bool(self.image_ids)

    @property
    def images(self) -> bool:  # type: ignore[override]
        return self.text_prior and not self.image_ids

    def capacity(self, prompt: Prompt) -> int:
        budget = super().capacity(prompt)
        if not self.text_prior:
            return budget
        # As many slots for every row as the one with most text needs.
        return max(budget, int(self._certain(prompt).sum(-1).max()))

    def score(self, prompt: Prompt) -> Tensor:
        assert prompt.mass is not None
        if self.text_prior:
            return prompt.mass.masked_fill(self._certain(prompt)[:, None], torch.inf)
        budget = super().capacity(prompt)
        recent = self._recent(budget)
        return protect(prompt.mass, prompt.valid, min(self.sinks, budget - recent), recent)

    def merge(self, prompt: Prompt, kept: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().merge(prompt, kept)
        if self.merging == "none" or kept.shape[2] == prompt.keys.shape[2]:
            return keys, values
        gone = torch.ones_like(prompt.keys[..., 0], dtype=torch.bool).scatter(2, kept, False)
        gone &= prompt.valid[:, None]
        rows = prompt.valid[:, None].expand(*gone.shape).gather(2, kept)
        target, similarity = nearest(prompt.keys, keys, rows)
        if self.merging == "weighted":
            gone &= _alike(similarity, gone)
        if self.merge_keys:
            keys = self._folded(keys, prompt.keys, target, similarity, gone)
        return keys, self._folded(values, prompt.values, target, similarity, gone)

    def _certain(self, prompt: Prompt) -> Tensor:
        """Text and the most recent tokens, bool ``[B, S]``."""
        recent = self._recent(super().capacity(prompt))
        late = torch.arange(prompt.valid.shape[1], device=prompt.valid.device) >= prompt.valid.shape[1] - recent
        return (~images(prompt, self.image_ids) | late) & prompt.valid

    def _recent(self, budget: int) -> int:
        return min(budget, round(self.recent * budget))

    def _folded(self, kept: Tensor, x: Tensor, target: Tensor, similarity: Tensor, gone: Tensor) -> Tensor:
        """Means of the ``kept`` ``[B, H_kv, n, D]`` and of what of ``x`` is ``gone`` into each."""
        where = target[..., None].expand(*x.shape)
        source = x.float()
        if self.merging == "pivot":
            source = (source + kept.float().gather(2, where)) / 2
        elif self.merging == "weighted":
            source = source * similarity[..., None]
        total = kept.float().scatter_add(2, where, source.masked_fill(~gone[..., None], 0.0))
        count = torch.ones_like(total[..., 0]).scatter_add(2, target, gone.float())
        return (total / count[..., None]).to(x.dtype)


def nearest(keys: Tensor, targets: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``keys`` ``[B, H, S, D]`` the most similar of ``targets`` ``[B, H, n, D]``, by their cosine.

    allowed: bool ``[B, H, n]``. Returns places int64 ``[B, H, S]`` and cosines, float32.
    """
    to = F.normalize(targets.float(), dim=-1).mT
    found = [
        (F.normalize(part.float(), dim=-1) @ to).masked_fill(~allowed[:, :, None], -torch.inf).max(-1)
        for part in keys.split(BLOCK, 2)
    ]
    return torch.cat([best.indices for best in found], 2), torch.cat([best.values for best in found], 2)


def _alike(similarity: Tensor, gone: Tensor) -> Tensor:
    """Tokens at least as similar to what stays as those of their row on average, bool ``[B, 1, S]``."""
    of_gone = similarity.masked_fill(~gone, 0.0)
    token = of_gone.sum(1) / gone.sum(1).clamp(min=1)
    row = of_gone.sum((1, 2)) / gone.sum((1, 2)).clamp(min=1)
    return (token >= row[:, None])[:, None]


class LookM(EvictingMethod):
    """After the prompt text stays whole, tokens of images by attention; the others are merged into them."""

    name = "look_m"
    paper = "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference (2024)"
    Options = LookMOptions

    options: LookMOptions

    def apply(self, context: RewriteContext) -> PassResult:
        anatomy = context.anatomy
        if anatomy.phase == "prefill" and self.policy().images and not anatomy.filled:
            return self.result([], [Decline("graph", Reason.NO_IMAGES)])
        return super().apply(context)

    def policy(self) -> LookMPolicy:
        own = self.settings("recent", "merge_keys", "text_prior", "sinks")
        return LookMPolicy(merging=self.options.merge, image_ids=self.options.image_ids, **own)
