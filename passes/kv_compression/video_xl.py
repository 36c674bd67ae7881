"""Video-XL's bi-level cache: the chunks that a question is about stay dense, the others are pooled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchaccel.runtime.eviction import Budget, Eviction, Prompt, Step, newest_first

from ..offloading import Offload, needs_restore
from .evicting import EvictingMethod
from .modality import ImageTokens, ModalityOptions, images


class VideoXLOptions(ModalityOptions):
    """chunk: tokens of a chunk. compression: neighbouring tokens that are pooled into one in the chunks that are not
    dense; of images alone where it is known which they are, else of all. window: last queries that ask, and tokens that
    always stay. restore: the prompt is set aside in host memory, and every further question chooses anew; offload: a
    folder, in whose files what is set aside lies then."""

    default_budget: ClassVar[Budget] = Budget(ratio=0.5)

    chunk: int = Field(default=256, ge=1)
    compression: int = Field(default=4, ge=1, le=64)
    window: int = Field(default=32, ge=1, le=512)
    restore: bool = False
    offload: Offload = None

    @model_validator(mode="after")
    def _set_aside(self) -> VideoXLOptions:
        return needs_restore(self)


@dataclass(frozen=True)
class VideoXLPolicy(Eviction):
    """Of pooled tokens the last one stays and stands for all: it holds the means of their keys and of their values.

    Chunks are counted from the first token of a row. What the budget has beyond all chunks pooled goes to dense ones:
    the last, the first two, then by the attention that the question pays to their mean keys.
    """

    budget: Budget
    chunk: int = 256
    compression: int = 4
    window: int = 32
    restore: bool = False
    image_ids: ImageTokens = ()
    folder: str | None = None

    @property
    def last_queries(self) -> int:  # type: ignore[override]
        return self.window

    @property
    def token_ids(self) -> bool:  # type: ignore[override]
        return bool(self.image_ids)

    @property
    def images(self) -> bool:  # type: ignore[override]
        return not self.image_ids

    @property
    def later_queries(self) -> int:  # type: ignore[override]
        return self.window if self.restore else 0

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return not self.restore

    def score(self, prompt: Prompt) -> Tensor:
        pooled, place = self._pooled(prompt), prompt.valid.cumsum(-1) - 1
        chunk = torch.where(prompt.valid, place // self.chunk, 0)
        last = place[:, -1:] // self.chunk
        # Shares of attention are below 1: the chunks that are dense whatever is asked come before the others.
        importance = self._relevance(prompt, chunk).gather(2, chunk[:, None].expand(-1, prompt.keys.shape[1], -1))
        for rank, index in ((1.1, 1), (1.2, 0), (1.3, last)):
            importance = importance.masked_fill((chunk == index)[:, None], rank)
        stand_in = pooled & self._ends(pooled, chunk, place)
        importance = importance + 2.0 * stand_in[:, None]
        importance = importance.masked_fill(~pooled[:, None], 4.0)
        return newest_first(importance, min(self.window, self.capacity(prompt)))

    def merge(self, prompt: Prompt, kept: Tensor) -> tuple[Tensor, Tensor]:
        if kept.shape[2] == prompt.keys.shape[2]:
            return super().merge(prompt, kept)
        pooled = self._pooled(prompt)[:, None].expand(*prompt.keys.shape[:3])
        tokens = torch.arange(prompt.keys.shape[2], device=kept.device)
        # Everything between one token that stays and the next goes into the latter.
        into = torch.searchsorted(kept, tokens.expand_as(pooled).contiguous()).clamp(max=kept.shape[2] - 1)
        stays = torch.zeros_like(pooled).scatter(2, kept, True)
        joins = stays | (pooled & pooled.gather(2, kept).gather(2, into))
        count = torch.zeros(kept.shape, device=kept.device).scatter_add(2, into, joins.float())
        where = into[..., None].expand(*prompt.keys.shape)

        def mean(x: Tensor) -> Tensor:
            total = torch.zeros(*kept.shape, x.shape[3], device=x.device)
            total.scatter_add_(2, where, x.float().masked_fill(~joins[..., None], 0.0))
            return (total / count[..., None]).to(x.dtype)

        return mean(prompt.keys), mean(prompt.values)

    def due(self, step: Step) -> bool:
        return step.fresh > 1

    def recall(self, prompt: Prompt, step: Step, capacity: int) -> Tensor:
        return self.keep(replace(prompt, queries=prompt.queries[:, :, -step.fresh :]))

    def _pooled(self, prompt: Prompt) -> Tensor:
        """Tokens that may be pooled with others, bool ``[B, S]``."""
        known = self.image_ids or prompt.images is not None
        return images(prompt, self.image_ids) & prompt.valid if known else prompt.valid

    def _ends(self, pooled: Tensor, chunk: Tensor, place: Tensor) -> Tensor:
        """The last tokens of groups of ``compression``, which end with their chunk and where text begins."""
        ahead = torch.zeros_like(pooled[:, :1])
        begins = torch.cat([~ahead, (chunk[:, 1:] != chunk[:, :-1]) | (pooled[:, 1:] != pooled[:, :-1])], 1)
        first = torch.where(begins, place, 0).cummax(1).values
        full = (place - first) % self.compression == self.compression - 1
        return full | torch.cat([begins[:, 1:], ~ahead], 1)

    def _relevance(self, prompt: Prompt, chunk: Tensor) -> Tensor:
        """Attention that the last queries pay to the mean key of every chunk, float32 ``[B, H_kv, chunks]``."""
        keys = prompt.keys.float().masked_fill(~prompt.valid[:, None, :, None], 0.0)
        batch, heads, tokens, dim = keys.shape
        chunks = -(-tokens // self.chunk)
        count = torch.zeros(batch, chunks, device=keys.device).scatter_add(1, chunk, prompt.valid.float())
        total = torch.zeros(batch, heads, chunks, dim, device=keys.device)
        total.scatter_add_(2, chunk[:, None, :, None].expand_as(keys), keys)
        mean = total / count.clamp(min=1)[:, None, :, None]
        asking = prompt.queries.float().unflatten(1, (heads, -1))
        scores = torch.einsum("bhgwd,bhcd->bhgwc", asking, mean) * prompt.scale
        shares = torch.softmax(scores.masked_fill((count == 0)[:, None, None, None], -torch.inf), -1)
        return shares.mean((2, 3))


class VideoXL(EvictingMethod):
    """After the prompt the chunks that its last queries ask for stay whole; of the others, a token for every few."""

    name = "video_xl"
    paper = "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification (2025)"
    Options = VideoXLOptions

    options: VideoXLOptions

    def policy(self) -> VideoXLPolicy:
        own = self.settings("chunk", "compression", "window", "restore")
        return VideoXLPolicy(image_ids=self.options.image_ids, folder=self.options.offload, **own)
