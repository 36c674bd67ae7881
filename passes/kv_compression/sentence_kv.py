"""SentenceKV: what stays of the prompt is grouped by sentence; steps read the sentences like the one being written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchaccel.errors import EvictedTokensError
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import Budget, Prompt, State
from torchaccel.runtime.selection import Call, Selection, Shapes, Sizes

from ..base import Decline, PassResult, Reason, RewriteContext, SitePlan
from ..retrieving import RetrievingOptions
from .evicting import EvictingMethod
from .snapkv import SnapKVPolicy

# Stored tokens that have a sentence vector to themselves, on average and at least: shorter sentences share one, so that
# float32 vectors are at most an eighth of what keys and values of 16 bits take.
TOKENS_PER_VECTOR = 8


class SentenceKVOptions(RetrievingOptions):
    """tokens: that a step reads. factor: how many times as many stay of the prompt, besides the last ``window`` ones,
    which vote for them; kernel: width of the smoothing of votes. ends: ids of the tokens that end a sentence, such as
    those of . ! ? and line breaks in the model's tokenizer; without any, sentences are ``longest`` tokens each.
    longest: tokens after which a sentence ends anyway. start, recent: first and last tokens that are always read."""

    dense_layers: int = Field(default=0, ge=0)
    tokens: int = Field(default=1024, ge=1)
    factor: float = Field(default=3.0, ge=1.0)
    window: int = Field(default=32, ge=1, le=512)
    kernel: int = Field(default=7, ge=1, le=63)
    ends: tuple[int, ...] = ()
    longest: int = Field(default=64, ge=1, le=4096)
    start: int = Field(default=32, ge=0)
    recent: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _room(self) -> SentenceKVOptions:
        if self.tokens <= self.start + self.recent:
            raise ValueError(f"tokens {self.tokens} leave nothing beside start {self.start} and recent {self.recent}")
        return self


@dataclass(frozen=True)
class SentenceSelection(Selection):
    """Whole sentences by the product of their mean key with the mean query of the sentence that is being written.

    The token that ends a sentence belongs to it. The sentence that is not finished yet can be chosen, too. In the
    released code the first step of a sentence reads everything; here its query chooses by itself.

    State: ``totals`` float32 ``[B, H_kv, M, D]``, sums of the keys of a sentence; ``begins`` int32 ``[B, H_kv, M]``,
    its first slot; ``number`` int32 ``[B, H_kv, C]``, the sentence of a slot, -1 for padding; ``last`` int64
    ``[B, H_kv]``, the newest sentence; ``runs`` int32 ``[B, 1, C]``, tokens since one of ``ends``, a slot's own
    included; ``query`` float32 ``[B, H_kv, D]``, sum of the queries of the newest sentence, the mean of the heads of a
    KV head, and ``queries`` int64 ``[B]``, their number. A crop forgets the queries.
    """

    tokens: int
    ends: tuple[int, ...]
    longest: int
    start: int
    recent: int
    unit: ClassVar[Literal["blocks", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(self.ends))  # a list where it was read from a key

    @property
    def covers(self) -> int:
        return self.tokens

    @property
    def listed(self) -> int:
        return self.tokens

    @property
    def share(self) -> float:
        return 1 / TOKENS_PER_VECTOR

    @property
    def token_ids(self) -> bool:  # type: ignore[override]
        return bool(self.ends)

    @property
    def adopts(self) -> bool:
        return not self.ends

    def width(self, state: State) -> int:
        return self.tokens

    def tensors(self, sizes: Sizes) -> Shapes:
        heads = sizes.batch, sizes.heads
        sentences = sizes.capacity // TOKENS_PER_VECTOR + 2
        return {
            "totals": ((*heads, sentences, sizes.head_dim), torch.float32),
            "begins": ((*heads, sentences), torch.int32),
            "number": ((*heads, sizes.capacity + 2), torch.int32),
            "last": (heads, torch.int64),
            "runs": ((sizes.batch, 1, sizes.capacity + 2), torch.int32),
            "query": ((*heads, sizes.head_dim), torch.float32),
            "queries": ((sizes.batch,), torch.int64),
        }

    def begin(self, state: State, prompt: Prompt, keys: Tensor, kept: Tensor | None) -> None:
        self._fill(state, keys, kept, prompt.valid, prompt.ids)

    def adopt(self, state: State, keys: Tensor, valid: Tensor) -> None:
        self._fill(state, keys, None, valid, None)

    def _fill(self, state: State, keys: Tensor, kept: Tensor | None, valid: Tensor, ids: Tensor | None) -> None:
        """As ``begin``; valid, ids: see ``Prompt``."""
        tokens, stored = valid.shape[1], keys.shape[2]
        first = torch.where(valid.any(-1), valid.int().argmax(-1), tokens)
        before, runs = self._runs(ids, tokens, first, torch.zeros_like(first))
        starts = (before % self.longest == 0) & valid
        sentence = starts.int().cumsum(-1)[:, None].expand(*keys.shape[:2], -1)
        if kept is not None:
            sentence, runs = sentence.gather(2, kept), runs.gather(1, kept[:, 0])
        real = torch.arange(stored, device=keys.device) >= state["first"][:, None, None]
        # Numbers count the sentences of which something is stored; neighbours share a vector where there are too many.
        changed = torch.nn.functional.pad(sentence[..., 1:] != sentence[..., :-1], (1, 0), value=True)
        opens = changed | (torch.arange(stored, device=keys.device) == state["first"][:, None, None])
        number = (opens & real).long().cumsum(-1) - 1
        count, room = number[..., -1:] + 1, state["totals"].shape[2]
        number = torch.where(count > room, number * room // count.clamp(min=1), number)
        state["number"][..., :stored] = torch.where(real, number, -1)
        state["runs"][:, 0, :stored] = runs
        self._add(state, keys, 0, stored)

    def append(self, state: State, call: Call) -> None:
        n, end = call.keys.shape[2], int(call.lens[1])
        first = (state["first"] - end).clamp(min=0)
        before, runs = self._runs(call.ids, n, first, state["runs"][:, 0, end - 1].long())
        places = torch.arange(n, device=runs.device)
        starts = (before % self.longest == 0) & (places >= first[:, None])
        number = state["last"][..., None] + starts.long().cumsum(-1)[:, None]
        state["number"][..., end : end + n] = number.clamp(max=state["totals"].shape[2] - 1)
        state["runs"][:, 0, end : end + n] = runs
        self._add(state, call.keys, end, end + n)
        since = torch.where(starts, places, -1).amax(-1)
        newest = places >= since[:, None]
        queries = call.q.float().unflatten(1, (call.keys.shape[1], -1)).mean(2) * newest[:, None, :, None]
        state["query"].mul_((since < 0)[:, None, None]).add_(queries.sum(2))
        state["queries"].mul_(since < 0).add_(newest.sum(-1))

    def choose(self, state: State, call: Call) -> Tensor:
        end = int(call.lens[1]) + 1
        number, begins, last = state["number"][..., :end].long(), state["begins"].long(), state["last"][..., None]
        sentences = torch.arange(begins.shape[2], device=begins.device)
        ends = torch.where(sentences == last, end, begins.roll(-1, 2))
        sizes = (ends - begins).clamp(min=1) * state["queries"][:, None, None]
        scores = torch.einsum("bhmd,bhd->bhm", state["totals"], state["query"]) / sizes
        scores = scores.masked_fill(sentences > last, -torch.inf)
        # What is always read lies before `low` and from `high` on.
        first = state["first"][:, None, None]
        low, high = first + self.start, max(0, end - self.recent)
        begins = torch.maximum(begins, low)
        free = (ends.clamp(max=high) - begins).clamp(min=0).masked_fill(sentences > last, 0)
        taken = budgeted(scores, free, self.tokens - (end - first - (high - low).clamp(min=0)))
        slots, own = torch.arange(end, device=begins.device), number.clamp(min=0)
        within = (slots < high) & (slots - begins.gather(2, own) < taken.gather(2, own))
        chosen = (slots >= first) & (within | (slots < low) | (slots >= high))
        places = torch.where(chosen, chosen.cumsum(-1) - 1, self.tokens)
        listed = torch.full((*number.shape[:2], self.tokens + 1), -1, dtype=torch.int32, device=slots.device)
        listed.scatter_(2, places.clamp(max=self.tokens), slots.int().expand_as(places))
        return listed[..., : self.tokens].contiguous()

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        if good < end:
            raise EvictedTokensError(
                f"asked to continue a KV cache that was continued otherwise since; {type(self).__name__} no longer "
                "knows the sentences of its tokens: copy a cache (copy.deepcopy) before continuing it twice"
            )
        for name in ("totals", "begins", "query", "queries"):
            state[name].zero_()
        state["last"].fill_(-1)
        if end:
            self._add(state, read(0, end), 0, end)

    def _runs(self, ids: Tensor | None, n: int, first: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens since one of ``ends``, int64 ``[B, n]``, before and after each of n tokens; ``run``: before the first.

        first: int64 ``[B]``, how many of them are padding.
        """
        places = torch.arange(n, device=first.device).expand(first.shape[0], -1)
        if ids is None or not self.ends:
            ended = torch.zeros_like(places, dtype=torch.bool)
        else:
            ended = torch.isin(ids, torch.tensor(self.ends, device=ids.device)) & (places >= first[:, None])
        newest = torch.where(ended, places, -1).cummax(1).values
        newest = torch.nn.functional.pad(newest[:, :-1], (1, 0), value=-1)
        before = torch.where(newest >= 0, places - newest - 1, (run - first)[:, None] + places)
        return before, torch.where(ended, 0, before + 1)

    def _add(self, state: State, keys: Tensor, begin: int, end: int) -> None:
        """Add the keys of slots ``begin .. end``, whose sentences are numbered, to the sums of these."""
        number = state["number"][..., begin:end].long()
        before = state["number"][..., max(0, begin - 1) : end - 1].long()
        before = torch.nn.functional.pad(before, (number.shape[2] - before.shape[2], 0), value=-1)
        real, own = number >= 0, number.clamp(min=0)
        slots = torch.arange(begin, end, device=keys.device)
        opened = torch.where(real & (number != before), slots, -1).int()
        state["begins"].scatter_reduce_(2, own, opened, "amax")
        rows = own[..., None].expand(*own.shape, keys.shape[3])
        state["totals"].scatter_add_(2, rows, keys.float().masked_fill(~real[..., None], 0.0))
        state["last"].copy_(state["number"][..., end - 1])


def budgeted(scores: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """How many tokens of each sentence are read: best scores first, the last one cut at the budget.

    scores: float32 ``[..., M]``. sizes: int64 like it. budget: int64, tokens in all, of a shape that broadcasts.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    wanted = sizes.gather(-1, order)
    before = wanted.cumsum(-1) - wanted
    granted = torch.minimum((budget - before).clamp(min=0), wanted)
    return torch.zeros_like(sizes).scatter_(-1, order, granted)


class SentenceKV(EvictingMethod):
    """Keeps what the end of a prompt attends to, and reads whole sentences of it, like the one being written."""

    name = "sentence_kv"
    paper = "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching (2025)"
    Options = SentenceKVOptions

    options: SentenceKVOptions  # type: ignore[assignment]

    def apply(self, context: RewriteContext) -> PassResult:
        if self.options.ends and context.anatomy.ids is None:
            return self.result([], [Decline("graph", Reason.NO_TOKEN_IDS)])
        return super().apply(context)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        super().treat(plan, site)
        chosen = self.options
        plan.offload = chosen.offload
        plan.selection = SentenceSelection(chosen.tokens, chosen.ends, chosen.longest, chosen.start, chosen.recent)

    def policy(self) -> SnapKVPolicy:
        chosen = self.options
        budget = Budget(tokens=int(chosen.tokens * chosen.factor) + chosen.window)
        return SnapKVPolicy(budget, chosen.window, chosen.kernel, "max")
