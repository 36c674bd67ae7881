"""ZipCache: tokens that earn much attention, for how often they could, are stored in more bits than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchaccel.kernels.spec import KVFormat, dtype_name

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import Prompt
from torchaccel.runtime.mixing import Mixing

from ..base import Decline, Fidelity, Reason, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache
from .quantising import BLOCK

# Probes whose attention is computed at a time: with all of a long prompt's it would be as large as its square.
PROBES = 64


class ZipCacheOptions(LayerwiseOptions):
    """ratio: share of the tokens that matter less. high_bits, low_bits: of tokens that matter and of the others; 16 is
    full precision. interval: newest tokens that are exact until there are so many. recent, random: shares of the
    prompt's queries, the last ones and others, whose attention decides; seed: of the choice of the others."""

    ratio: float = Field(default=0.4, ge=0.0, le=1.0)
    high_bits: Literal[4, 8, 16] = 4
    low_bits: Literal[2, 4, 8] = 2
    interval: int = Field(default=100, ge=1, le=4096)
    recent: float = Field(default=0.05, gt=0.0, le=1.0)
    random: float = Field(default=0.05, ge=0.0, le=1.0)
    seed: int = 0


@dataclass(frozen=True)
class ZipCachePolicy(Mixing):
    """Attention that probe queries pay a token, over the number of probes that could pay it any."""

    recent: float = 0.05
    random: float = 0.05
    seed: int = 0

    def score(self, prompt: Prompt) -> Tensor:
        probes, real = self.probes(prompt)
        received = seen_by = torch.zeros((), device=probes.device)
        for rows, of_rows in zip(probes.split(PROBES, 1), real.split(PROBES, 1), strict=True):
            weights, seen = attention(prompt, rows, of_rows)
            received, seen_by = received + weights, seen_by + seen
        return prompt.grouped(received, "sum") / seen_by.clamp(min=1)[:, None]

    def probes(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The prompt's queries that vote, int64 ``[B, n]``, and which of these are no padding, bool ``[B, n]``."""
        queries, valid = prompt.queries.shape[2], prompt.valid
        tokens, device = prompt.keys.shape[2], prompt.keys.device
        last = min(queries, max(1, round(self.recent * tokens)))
        others = min(queries - last, round(self.random * tokens))
        recent = torch.arange(tokens - last, tokens, device=device).expand(valid.shape[0], -1)
        generator = torch.Generator().manual_seed(self.seed)
        lots = torch.rand(valid.shape[0], queries - last, generator=generator).to(device)
        first = tokens - queries
        drawn = lots.masked_fill(~valid[:, first : tokens - last], -1.0).topk(others, 1).indices + first
        chosen = torch.cat([recent, drawn], 1)
        return chosen, valid.gather(1, chosen)


def attention(prompt: Prompt, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that queries ``rows`` int64 ``[B, n]`` pay each token, summed, float32 ``[B, H, S]``, and how many of
    them see it, float32 ``[B, S]``. real: bool ``[B, n]``, False for queries that do not count."""
    tokens, group = prompt.keys.shape[2], prompt.queries.shape[1] // prompt.keys.shape[1]
    where = (rows - (tokens - prompt.queries.shape[2]))[:, None, :, None]
    q = prompt.queries.gather(2, where.expand(-1, prompt.queries.shape[1], -1, prompt.queries.shape[3]))
    scores = torch.einsum("bhgnd,bhsd->bhgns", q.float().unflatten(1, (-1, group)), prompt.keys.float()).flatten(1, 2)
    seen = torch.arange(tokens, device=rows.device) <= rows[..., None]
    seen = seen & prompt.valid[:, None] & real[..., None]
    # A query that sees nothing counts for nothing, and its softmax is not a number.
    weights = torch.softmax((scores * prompt.scale).masked_fill(~seen[:, None], -torch.inf), -1)
    return weights.masked_fill(~seen[:, None], 0.0).sum(2), seen.float().sum(1)


class ZipCache(LayerwiseMethod):
    """Sorts the prompt's tokens, and every ``interval`` newer ones, into two classes of 4 and 2 bits."""

    name = "zipcache"
    family = "kv_compression"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    stores = True
    paper = "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification (2024)"
    Options = ZipCacheOptions

    options: ZipCacheOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        problem = refuse_cache(site, sliding=False)
        if problem is None and site.head_dim % 8:
            problem = Decline(site.name, Reason.KERNEL_UNSUPPORTED, f"head_dim {site.head_dim} % 8 != 0")
        return problem

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        asked, dtype = self.options, dtype_name(site.dtype)
        high, low = (formats(bits, dtype, site.head_dim) for bits in (asked.high_bits, asked.low_bits))
        plan.mixing = ZipCachePolicy(high, low, asked.ratio, asked.interval, asked.recent, asked.random, asked.seed)


def formats(bits: int, dtype: str, head_dim: int) -> tuple[KVFormat, KVFormat]:
    """How the keys and values of a class are stored: a scale for each channel of a block of keys, each token of values.

    Every head of a token has a scale of its own, not all heads together as in the publication.
    """
    if bits == 16:
        return KVFormat("dense", dtype, head_dim), KVFormat("dense", dtype, head_dim)
    kind: Any = f"int{bits}"
    keys = KVFormat(kind, dtype, head_dim, "channel", BLOCK, 0, 0, "channel")
    return keys, KVFormat(kind, dtype, head_dim, "token", BLOCK, 0, 0, "token")
