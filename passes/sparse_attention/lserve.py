"""LServe: pages by the bounds of their parts, chosen once in several steps; streaming heads read sinks and a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchaccel.calibration.head_gates import HeadGates
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import State
from torchaccel.runtime.selection import Call, Selection, Shapes, Sizes
from torchaccel.runtime.summaries import SummarySelection

from ..base import Decline
from ..calibrated import CalibratedMethod
from ..retrieving import RetrievingMethod, RetrievingOptions
from ..streaming_heads import StreamingHeadsOptions

LEAST_PAGES = 3


class LServeOptions(StreamingHeadsOptions, RetrievingOptions):
    """tokens: that a step reads in retrieval heads, in whole pages, three at least. page: tokens of a page, and part:
    tokens of the parts whose bounds are kept. interval: steps that read by one choice. Without a plan and
    ``retrieval_heads`` all heads are retrieval heads."""

    dense_layers: int = Field(default=0, ge=0)
    sinks: int = Field(default=128, ge=0, le=65536)
    tokens: int = Field(default=4096, ge=1)
    page: Literal[32, 64, 128] = 64
    part: Literal[16, 32] = 16
    interval: int = Field(default=4, ge=1, le=16)

    @model_validator(mode="after")
    def _used(self) -> LServeOptions:
        unused = {"sparsity", "sinks", "recent", "steps"} & self.model_fields_set
        if not self.named and unused:
            raise ValueError(
                f"{' and '.join(sorted(unused))} are for streaming heads, and nothing says which heads these are; give "
                "a plan or retrieval_heads"
            )
        return self


@dataclass(frozen=True)
class ReusedPages(Selection):
    """The ``pages`` best pages of ``block`` slots, the newest among them; a choice serves for ``interval`` steps.

    A page is as good as the best of its parts of ``part`` slots, by their bounds. A page that was begun since is read
    besides. streaming: for each KV head whether it reads, instead, the pages with its first ``sinks`` tokens and the
    last ``recent // block + 1`` pages; no bounds are kept of its keys.
    State: ``summary``, as of ``SummarySelection``, of the other heads; ``listed`` int32 ``[B, H_kv, width]``, the last
    list; ``made`` int64 ``[B, 2]``, the slots that were stored when its pages were chosen, the step's own included, 0
    for no list, and the newest page that it has.
    """

    pages: int
    part: int
    interval: int
    streaming: tuple[bool, ...]
    sinks: int
    recent: int
    block: int = 64
    host: ClassVar[frozenset[str]] = frozenset({"made"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "streaming", tuple(self.streaming))  # a list where it was read from a key

    @property
    def adopts(self) -> bool:
        return True

    @property
    def covers(self) -> int:
        return self.sinks + self.recent if self._bound else self.pages * self.block

    @property
    def listed(self) -> int:
        far, near = self.pages * self.block * len(self._retrieving), (self.sinks + self.recent) * len(self._bound)
        return (far + near) // len(self.streaming)

    @property
    def share(self) -> float:
        return self._summaries.share / self.interval * len(self._retrieving) / len(self.streaming)

    def width(self, state: State) -> int:
        return self._width

    def tensors(self, sizes: Sizes) -> Shapes:
        retrieving = Sizes(sizes.batch, len(self._retrieving), sizes.capacity, sizes.head_dim, sizes.dtype)
        listed = (sizes.batch, sizes.heads, self._width), torch.int32
        return self._summaries.tensors(retrieving) | {"listed": listed, "made": ((sizes.batch, 2), torch.int64)}

    def append(self, state: State, call: Call) -> None:
        if call.keys.shape[2] > 1:
            state["made"].zero_()
        self._summarise(state, call.keys, call.lens)

    def choose(self, state: State, call: Call) -> Tensor:
        end, listed = int(call.lens[1]) + 1, state["listed"]
        since, page = state["made"][0].tolist()
        newest, retrieving = (end - 1) // self.block, self._at(self._retrieving)
        anew = not 0 < since <= end < since + self.interval
        if anew:
            since = end
            listed.fill_(-1)
            if self._retrieving:
                q = call.q.unflatten(1, (len(self.streaming), -1))[:, retrieving].flatten(1, 2)
                best = self._summaries.choose(state, Call(q, call.keys[:, retrieving], call.lens))
                listed[:, retrieving, : self.pages] = best
        if anew or page != newest:
            if self._retrieving and newest != (since - 1) // self.block:
                listed[:, retrieving, self.pages] = newest
            if self._bound:
                near = self._near(state["first"], newest)
                listed[:, self._at(self._bound), : near.shape[1]] = near[:, None]
            state["made"].copy_(torch.tensor([since, newest]))
        return listed.clone()

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        state["made"].zero_()
        begin = min(good, end) // self.block * self.block
        self._summarise(state, read(begin, end), torch.tensor([0, begin, begin]))

    def _near(self, first: Tensor, newest: int) -> Tensor:
        """The pages of streaming heads, int32 ``[B, N]``, -1 for none; first: int64 ``[B]``."""
        begin = first[:, None] // self.block
        early = begin + torch.arange(self._first_pages, device=first.device)
        end = (first[:, None] + self.sinks - 1) // self.block if self.sinks else begin - 1
        late = newest - torch.arange(self._last_pages, device=first.device).expand(first.shape[0], -1)
        early = torch.where((early <= end) & (early <= newest), early, -1)
        return torch.cat([early, torch.where(late > torch.maximum(end, begin - 1), late, -1)], 1).int()

    def _summarise(self, state: State, keys: Tensor, lens: Tensor) -> None:
        if self._retrieving:
            self._summaries.append(state, Call(keys, keys[:, self._at(self._retrieving)], lens))

    def _at(self, heads: tuple[int, ...]) -> slice | list[int]:
        """An index of heads, without a copy where they are all."""
        return slice(None) if len(heads) == len(self.streaming) else list(heads)

    @cached_property
    def _retrieving(self) -> tuple[int, ...]:
        return tuple(head for head, streaming in enumerate(self.streaming) if not streaming)

    @cached_property
    def _bound(self) -> tuple[int, ...]:
        return tuple(head for head, streaming in enumerate(self.streaming) if streaming)

    @cached_property
    def _summaries(self) -> SummarySelection:
        return SummarySelection("minmax", self.pages, self.block, pool=self.block // self.part)

    @cached_property
    def _width(self) -> int:
        # Pages of a choice, and one that was begun since.
        return max(self.pages + 1, self._first_pages + self._last_pages if self._bound else 0)

    @property
    def _first_pages(self) -> int:
        # With left padding the first tokens may begin anywhere in a page.
        return -(-self.sinks // self.block) + 1 if self.sinks else 0

    @property
    def _last_pages(self) -> int:
        return self.recent // self.block + 1


class LServe(CalibratedMethod, RetrievingMethod):
    """Retrieval heads read the pages of highest bound of q . k, chosen anew every few steps, the query heads of a KV
    head together; streaming heads read their first and last tokens.

    All tokens stay in the cache, and bounds of an eighth of the retrieval heads' keys (parts of 16) with them. Prompts,
    and several new tokens, attend to everything in all heads.
    """

    name = "lserve"
    family = "sparse_attention"
    paper = "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention (2025)"
    calibration = "optional"
    calibrator = HeadGates
    lenders = ("duo_attention",)
    Options = LServeOptions

    options: LServeOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        return self.options.refuse(site) or super().refuse(site)

    def policy(self, site: AttentionSite) -> ReusedPages:
        asked = self.options
        streaming = asked.streaming(site) if asked.named else (False,) * site.kv_heads
        pages = max(LEAST_PAGES, asked.tokens // asked.page)
        return ReusedPages(pages, asked.part, asked.interval, streaming, asked.sinks, asked.recent, asked.page)
