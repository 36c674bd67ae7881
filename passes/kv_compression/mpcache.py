"""MPCache: the prompt is looked at once to drop what nobody needs; steps then choose clusters of what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchaccel.kernels import registry
from torchaccel.kernels.selection_spec import SelectionSpec, SummarySpec
from torchaccel.kernels.spec import dtype_name

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import EVERY_QUERY, Budget, Eviction, Prompt, State
from torchaccel.runtime.selection import Call, Selection, Shapes, Sizes
from torchaccel.runtime.summaries import summary_rows

from ..base import PassResult, RewriteContext, SitePlan
from ..retrieving import RetrievingOptions
from .evicting import EvictingMethod, EvictingOptions

# Tokens of a cluster of the finer and of the coarser level.
FINE, COARSE = 16, 32
# Shares are whole thousandths: a float times a symbolic length would specialise the graph to it.
PARTS = 1000
# Queries whose attention is held at once: the S x S matrix never is.
CHUNK = 128
EVERYTHING = 1 << 40


class MPCacheOptions(EvictingOptions, RetrievingOptions):
    """looks: share of the prompt's queries, the last ones, whose attention decides what stays of it. coarse: share of
    the clusters of 32 tokens that a step looks into. fine: share of all clusters of 16 that it reads. alpha: weight of
    a cluster's maxima against its minima. share: adjacent layers that read the same tokens."""

    default_budget: ClassVar[Budget] = Budget(ratio=0.4)

    looks: float = Field(default=0.2, gt=0.0, le=1.0)
    coarse: float = Field(default=0.5, gt=0.0, le=1.0)
    fine: float = Field(default=0.2, gt=0.0, le=1.0)
    alpha: float = Field(default=0.6, ge=0.0, le=1.0)
    share: int = Field(default=2, ge=1, le=8)


@dataclass(frozen=True)
class LookOncePolicy(Eviction):
    """Keeps what the last queries attend to; their number is a share of a row's real tokens.

    The released code takes the softmax without scale and mask, and a threshold that differs by task.
    """

    budget: Budget
    looks: float = 0.2
    last_queries: int = EVERY_QUERY

    def score(self, prompt: Prompt) -> Tensor:
        tokens = prompt.keys.shape[2]
        rows = (prompt.valid.sum(-1) * self.looks).int().clamp(min=1)
        received = torch.zeros(prompt.keys.shape[:3], device=prompt.keys.device)
        for begin in range(tokens - int(rows.max()), tokens, CHUNK):
            weights = prompt.window_attention(begin, begin + CHUNK)
            row = torch.arange(begin, begin + weights.shape[2], device=rows.device)
            votes = (weights * (row >= tokens - rows[:, None])[:, None, :, None]).sum(2)
            received += prompt.grouped(votes)
        # The mean over the queries that see a token: by the sum, the newest ones would go for being new.
        seen = torch.minimum(rows[:, None], tokens - torch.arange(tokens, device=rows.device))
        return received / seen[:, None]


@dataclass(frozen=True)
class ClusterSelection(Selection):
    """Clusters of adjacent slots, coarse to fine, by ``q . (alpha maxima + (1 - alpha) minima)`` of their keys.

    The similarity is linear, so that the query heads of a KV head choose by their mean query. coarse, fine: thousandths
    of the clusters. The first and the last cluster are always read, besides those shares.
    """

    coarse: int
    fine: int
    alpha: float
    block: int = FINE

    @property
    def adopts(self) -> bool:
        return True

    @property
    def covers(self) -> int:
        return EVERYTHING if self.coarse == self.fine == PARTS else 0

    @property
    def listed(self) -> int:
        return 2 * FINE

    @property
    def share(self) -> float:
        return self.fine / PARTS + 1 / FINE + 1 / COARSE

    def width(self, state: State) -> int:
        return state["fine"].shape[2] * self.fine // PARTS + 2

    def tensors(self, sizes: Sizes) -> Shapes:
        return {
            name: ((sizes.batch, sizes.heads, summary_rows(sizes.capacity, block), 2, sizes.head_dim), sizes.dtype)
            for name, block in (("coarse", COARSE), ("fine", FINE))
        }

    def append(self, state: State, call: Call) -> None:
        for name, block in (("coarse", COARSE), ("fine", FINE)):
            _summarise(state, name, block, call.keys, call.lens)

    def choose(self, state: State, call: Call) -> Tensor:
        lens, first = call.grown, state["first"]
        end = int(lens[1])
        # The rows are [minima, maxima]: one product with both halves of this.
        q = torch.cat([(1 - self.alpha) * call.q.float(), self.alpha * call.q.float()], 3)
        group = call.q.shape[1] // call.keys.shape[1]
        levels = [
            _scores(q, state[name], lens, first, group, block, dtype_name(call.keys.dtype))
            for name, block in (("coarse", COARSE), ("fine", FINE))
        ]
        counts = [(-(-end // block) - first // block) * share // PARTS for block, share in self._levels()]
        chosen = hierarchy(*levels, *counts)
        numbers = torch.arange(chosen.shape[2], device=chosen.device)
        chosen |= (numbers == chosen.shape[2] - 1) | (numbers == (first // FINE)[:, None])[:, None]
        places = torch.where(chosen, numbers, chosen.shape[2]).sort(-1).values
        places = torch.nn.functional.pad(places, (0, self.width(state)), value=chosen.shape[2])
        places = places[..., : self.width(state)]
        return torch.where(places == chosen.shape[2], -1, places).int().contiguous()

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        for name, block in (("coarse", COARSE), ("fine", FINE)):
            begin = min(good, end) // block * block
            _summarise(state, name, block, read(begin, end), torch.tensor([0, begin, begin]))

    def _levels(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (COARSE, self.coarse), (FINE, self.fine)


def hierarchy(coarse: Tensor, fine: Tensor, coarse_count: Tensor, fine_count: Tensor) -> Tensor:
    """Which clusters of the finer level are chosen, bool ``[B, H, N]``: the best of those within the best coarser ones.

    coarse, fine: float32 ``[B, H, N / 2]`` (rounded up) and ``[B, H, N]``, -inf for dead clusters. coarse_count,
    fine_count: int64 ``[B]``, how many are taken of each level at most.
    """
    within = _best(coarse, coarse_count).repeat_interleave(2, 2)[..., : fine.shape[2]]
    return _best(fine.masked_fill(~within, -torch.inf), fine_count)


def _best(scores: Tensor, count: Tensor) -> Tensor:
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best = torch.arange(scores.shape[-1], device=scores.device) < count[:, None, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, best.expand_as(order)) & (scores > -torch.inf)


def _summarise(state: State, name: str, block: int, keys: Tensor, lens: Tensor) -> None:
    dtype = dtype_name(keys.dtype)
    run = registry.summarise(SummarySpec("minmax", keys.shape[3], dtype, dtype, block), keys.device.type).run
    run(keys, state[name], torch.empty(0, device=keys.device), lens, state["first"])


def _scores(q: Tensor, bounds: Tensor, lens: Tensor, first: Tensor, group: int, block: int, stored: str) -> Tensor:
    """Products of the group's mean query ``[B, H, 1, 2 D]`` with rows ``[B, H_kv, N, 2, D]`` taken for one each."""
    rows: Literal["mean"] = "mean"
    spec = SelectionSpec(SummarySpec(rows, q.shape[3], stored, stored, block), group, "float32", 1, "mean")
    found: Tensor = registry.scores(spec, q.device.type).run(q, bounds.flatten(3), lens, first)
    return found


class MPCache(EvictingMethod):
    """Drops what the prompt's last queries do not attend to; then every step reads a fifth of the clusters left.

    Pairs of layers keep, and read, the same tokens.
    """

    name = "mpcache"
    paper = "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference (2025)"
    Options = MPCacheOptions

    options: MPCacheOptions

    def apply(self, context: RewriteContext) -> PassResult:
        result = super().apply(context)
        own = self._selection()
        treated = [site for site in context.anatomy.attentions if context.plan(site).selection == own]
        for place, site in enumerate(treated):
            leader = treated[place - place % self.options.share]
            if leader is not site and (leader.heads, leader.kv_heads) == (site.heads, site.kv_heads):
                context.plan(site).leader = leader.index
        return result

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        super().treat(plan, site)
        plan.selection, plan.offload = self._selection(), self.options.offload

    def policy(self) -> LookOncePolicy:
        return LookOncePolicy(**self.settings("looks"))

    def _selection(self) -> ClusterSelection:
        coarse, fine = round(self.options.coarse * PARTS), round(self.options.fine * PARTS)
        return ClusterSelection(coarse, fine, self.options.alpha)
