"""What a policy that drops tokens from a KV cache is told, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .aside import Aside

State = dict[str, Tensor]
# As ``last_queries``: all of them.
EVERY_QUERY = 1 << 30


@dataclass(frozen=True)
class Budget:
    """How much of a layer's cache stays: one of the three.

    tokens: for each KV head. ratio: share of the prompt's tokens. bytes: of keys and values of one batch row and layer.
    """

    tokens: int | None = None
    ratio: float | None = None
    bytes: int | None = None

    def of(self, length: int, token_bytes: float) -> int:
        """Tokens per KV head for a prompt of ``length``; token_bytes: of one token, keys and values, all KV heads."""
        if self.tokens is not None:
            return self.tokens
        if self.ratio is not None:
            return max(1, int(self.ratio * length))
        assert self.bytes is not None
        return max(1, int(self.bytes / token_bytes))


@dataclass(frozen=True)
class Prompt:
    """A layer's prompt after its attention.

    queries: ``[B, H, w, D]``, those of the last w tokens, after rotary embedding. keys, values: ``[B, H_kv, S, D]``.
    mass: float32 ``[B, H_kv, S]``, attention each token received, summed over queries and the group's heads; None
    unless the policy asks for it. valid: bool ``[B, S]``, False for padding. scale: of q . k. layer, layers: which one
    of how many. token_bytes: stored bytes of a token. plain_queries: ``[B, H, S, D]``, before rotary embedding, where
    the policy asks for them; tables: cosine and sine of its last two positions ``[B | 1, .., 2, R]``, None without it;
    pairs: the channels that rotate together, "half" or "interleaved". ids: int64 ``[B, S]``, of the tokens, where the
    policy asks for them. images: bool ``[B, S]``, tokens that stand for features of images or the like, where it asks.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    mass: Tensor | None
    valid: Tensor
    scale: float
    layer: int
    layers: int
    token_bytes: float
    plain_queries: Tensor | None = None
    tables: tuple[Tensor, Tensor] | None = None
    pairs: str = "half"
    ids: Tensor | None = None
    images: Tensor | None = None

    def mean_rotation(self, future: int) -> Tensor | None:
        """The rotary embedding of the ``future`` positions behind the prompt, averaged: float32 ``[B | 1, 1, D, D]``.

        None where the model has none. What a position adds to the angles is read off the prompt's last two.
        """
        if self.tables is None:
            return None
        cos, sin = (table.double().flatten(1, -2) for table in self.tables)
        half = cos.shape[-1] // 2
        pick = slice(None, half) if self.pairs == "half" else slice(None, None, 2)
        turns = torch.complex(cos[..., pick], sin[..., pick])
        last, step = turns[:, -1], torch.angle(turns[:, -1] * turns[:, -2].conj())
        ahead = torch.arange(1, future + 1, device=step.device, dtype=torch.float64)
        mean = last * torch.polar(torch.ones_like(step[..., None]), step[..., None] * ahead).mean(-1)
        matrix = torch.eye(self.keys.shape[3], device=step.device, dtype=torch.float64).repeat(mean.shape[0], 1, 1)
        first = torch.arange(half, device=step.device)
        first, second = (first, first + half) if self.pairs == "half" else (2 * first, 2 * first + 1)
        matrix[:, first, first] = matrix[:, second, second] = mean.real
        matrix[:, second, first] = mean.imag
        matrix[:, first, second] = -mean.imag
        return matrix.float()[:, None]

    def window_attention(self, first: int = 0, last: int | None = None) -> Tensor:
        """Attention of queries ``first .. last`` over the prompt: float32 ``[B, H, n, S]``, rows of padding zero."""
        heads, w = self.queries.shape[1:3]
        last = w if last is None else min(last, w)
        tokens, group = self.keys.shape[2], heads // self.keys.shape[1]
        q = self.queries[:, :, first:last].float().unflatten(1, (-1, group))
        scores = torch.einsum("bhgwd,bhsd->bhgws", q, self.keys.float()).flatten(1, 2) * self.scale
        column = torch.arange(tokens, device=q.device)
        query = column[tokens - w + first : tokens - w + last, None]
        seen = (column <= query) & self.valid[:, None, None]
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return weights.masked_fill(~(seen & self.valid[:, query.squeeze(1)][:, None, :, None]), 0.0)

    def later_attention(self) -> Tensor:
        """Attention of queries that come behind the prompt to its tokens alone: float32 ``[B, H, w, S]``."""
        q = self.queries.float().unflatten(1, (self.keys.shape[1], -1))
        scores = torch.einsum("bhgwd,bhsd->bhgws", q, self.keys.float()).flatten(1, 2) * self.scale
        return torch.softmax(scores.masked_fill(~self.valid[:, None, None], -torch.inf), -1)

    def grouped(self, x: Tensor, reduce: str = "mean") -> Tensor:
        """Scores of query heads ``[B, H, S]`` as scores of KV heads ``[B, H_kv, S]``: their "mean", "sum" or "max"."""
        x = x.unflatten(1, (self.keys.shape[1], -1))
        return x.amax(2) if reduce == "max" else x.mean(2) if reduce == "mean" else x.sum(2)


@dataclass(frozen=True)
class Step:
    """A later call of the layer: some new tokens, appended and attended.

    mass: float32 ``[B, H_kv, n]``, attention that each of the n stored tokens received, summed over the new queries and
    the group's heads; None unless the policy asks for it. stored: n. fresh: new tokens, the last ones of the n. group:
    query heads of a KV head. count: calls since the prompt, this one included. ids: int64 ``[B, fresh]``, of the new
    tokens, where the policy asks for them and the call was given any.
    """

    mass: Tensor | None
    stored: int
    fresh: int
    group: int
    count: int
    ids: Tensor | None = None


@dataclass(frozen=True)
class HeadWindows:
    """KV heads that see only the first tokens of a row and the last ones.

    bound: for each KV head whether it is one. sinks: first tokens. recent: last tokens, a query's own included.
    """

    bound: tuple[bool, ...]
    sinks: int
    recent: int

    # Tokens kept beyond the window, so that as many can be taken back: assisted generation proposes 20 by default.
    REWIND: ClassVar[int] = 32

    def limits(self) -> Tensor:
        """Most tokens that each KV head has to keep, int64 ``[H_kv]``."""
        most = self.sinks + self.recent + self.REWIND
        return torch.tensor([most if bound else torch.iinfo(torch.int64).max for bound in self.bound])


class Eviction:
    """Which tokens of a layer's cache stay. Subclasses are frozen dataclasses: they guard compiled graphs.

    The prompt's attention, and every later call's, sees all that is stored; what is evicted goes afterwards.
    last_queries: how many of the prompt's queries are wanted. prompt_mass, step_mass: whether the attention that tokens
    receive is. grows: nothing is evicted after the prompt. unrotated: queries before rotary embedding are wanted.
    token_ids: the tokens' ids are; a prompt without is left as it is. images: which tokens stand for images is, too.
    later_queries: how many of the last queries, of all calls, are wanted to choose anew: the whole prompt is set aside
    then, and what does not stay may come back; folder: of the files for it, None for memory. ragged: KV heads keep
    different numbers of tokens, see ``RaggedEviction``. windows: heads that see a window only.
    """

    budget: Budget
    last_queries: int = 0
    prompt_mass: bool = False
    step_mass: bool = False
    grows: bool = True
    unrotated: bool = False
    token_ids: bool = False
    images: bool = False
    later_queries: int = 0
    folder: str | None = None
    ragged: bool = False
    windows: HeadWindows | None = None

    def capacity(self, prompt: Prompt) -> int:
        """Tokens of each KV head that stay after the prompt."""
        return self.budget.of(prompt.keys.shape[2], prompt.token_bytes)

    def keep(self, prompt: Prompt) -> Tensor:
        """The tokens that stay, int64 ``[B, H_kv, n]``, ascending; all of them when the budget suffices."""
        tokens, capacity = prompt.keys.shape[2], self.capacity(prompt)
        if capacity >= tokens:
            return torch.arange(tokens, device=prompt.keys.device).expand(*prompt.keys.shape[:2], -1)
        return best(self.score(prompt).masked_fill(~prompt.valid[:, None], -torch.inf), capacity)

    def score(self, prompt: Prompt) -> Tensor:
        """How much each token of the prompt matters, float32 ``[B, H_kv, S]``; plus infinity is kept for certain."""
        raise NotImplementedError

    def merge(self, prompt: Prompt, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that stay, ``[B, H_kv, n, D]``, here as they are in the prompt.

        kept: as ``keep`` gave it. A policy may put into them what would be lost of the others.
        """
        where = kept[..., None].expand(-1, -1, -1, prompt.keys.shape[3])
        return prompt.keys.gather(2, where), prompt.values.gather(2, where)

    def state(self, prompt: Prompt, kept: Tensor) -> State:
        """What is remembered of every kept token, tensors ``[B, H_kv, n]``; new tokens begin with zeros."""
        return {}

    def observe(self, state: State, step: Step) -> None:
        """Update ``state`` (tensors ``[B, H_kv, n]``) in place after a call, unless the cache ``grows``."""

    def evict(self, state: State, step: Step, capacity: int) -> Tensor | None:
        """The tokens that stay after a call, as ``keep`` gives them; None for all."""
        return None

    def due(self, step: Step) -> bool:
        """Whether to choose anew after this call, where the prompt was set aside."""
        return False

    def recall(self, prompt: Prompt, step: Step, capacity: int) -> Tensor:
        """The tokens of the prompt to hold from now on, as ``keep`` gives them; its queries are the last ones."""
        raise NotImplementedError


class RaggedEviction(Eviction):
    """A policy under which KV heads, and rows, keep different numbers of tokens; padding is never one of them."""

    ragged: bool = True

    def kept(self, prompt: Prompt) -> Tensor:
        """Which tokens stay after the prompt, bool ``[B, H_kv, S]``."""
        raise NotImplementedError


class LateEviction(Eviction):
    """A policy that keeps the whole prompt at first: what matters shows while decoding."""

    sinks: int

    def keep(self, prompt: Prompt) -> Tensor:
        return torch.arange(prompt.keys.shape[2], device=prompt.keys.device).expand(*prompt.keys.shape[:2], -1)

    def marks(self, prompt: Prompt, kept: Tensor) -> State:
        """Which kept tokens are the first ``sinks`` of their row, and which are padding: 0 or 1, ``[B, H_kv, n]``."""
        early = (prompt.valid.int().cumsum(-1) <= self.sinks) & prompt.valid
        parts = {"safe": early, "padding": ~prompt.valid}
        return {name: x[:, None].expand(-1, kept.shape[1], -1).float() for name, x in parts.items()}


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest scores ``[..., n]``, ascending; of equal scores the earlier places win."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


def newest_first(scores: Tensor, count: int) -> Tensor:
    """Scores ``[..., n]`` with plus infinity for the last ``count``: later slots hold newer tokens."""
    place = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(place >= scores.shape[-1] - count, torch.inf)


def protect(scores: Tensor, valid: Tensor, sinks: int, recent: int) -> Tensor:
    """Scores ``[B, H, S]`` with plus infinity for the first ``sinks`` tokens of each row and the last ``recent``."""
    tokens = scores.shape[-1]
    early = (valid.int().cumsum(-1) <= sinks) & valid
    late = torch.arange(tokens, device=scores.device) >= tokens - recent
    return scores.masked_fill((early | late)[:, None], torch.inf)


@dataclass
class EvictionRecord:
    """What a storage remembers for its policy between calls.

    state: see ``Eviction.state``, with room for the storage's capacity. capacity: tokens that the budget allows.
    aside: the whole prompt, where the policy may choose anew.
    """

    state: State
    capacity: int
    calls: int = 0
    aside: Aside | None = None
