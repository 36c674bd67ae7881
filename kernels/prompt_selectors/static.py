"""Lists that follow from positions alone: strided blocks (LongGen), and chunks (Video-XL-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import registry
from ..spec import AttentionSpec
from .base import PromptSelector, banded_share


@dataclass(frozen=True)
class StaticBlocks(PromptSelector):
    """Blocks are counted from the one that holds a row's first live token. Subclasses say which are read."""

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        heads, tokens = k.shape[1], q.shape[2]
        block = torch.arange(-(-tokens // self.block), device=q.device).expand(q.shape[0], -1)
        if first is not None:
            block = block - (first // self.block)[:, None]
        columns, diagonals, pairs = self.flags(block[:, None], heads, tokens, first)
        lists: Tensor = registry.block_lists(q.device.type)(columns, diagonals, pairs, first, self.block)
        return lists.repeat_interleave(q.shape[1] // lists.shape[1], 1)

    def flags(
        self, block: Tensor, heads: int, tokens: int, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Columns, diagonals and pairs as of ``block_lists``, for each KV head or for one that stands for all.

        block: int64 ``[B, 1, N]``, the blocks' numbers, negative in the padding. heads: KV heads.
        """
        raise NotImplementedError

    def effort(self, tokens: int) -> float:
        # A flag for each pair of blocks: nothing beside products for each pair of tokens.
        return 0.0


@dataclass(frozen=True)
class StridedBlocks(StaticBlocks):
    """The first ``sinks`` blocks, the nearest ``local`` ones, the own included, and every ``stride``-th before them.

    KV head h begins with block h modulo stride, so that the heads see all blocks together (LongGen).
    """

    sinks: int = 1
    local: int = 16
    stride: int = 16

    def flags(
        self, block: Tensor, heads: int, tokens: int, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        offset = torch.arange(heads, device=block.device)[:, None]
        columns = (block < self.sinks) | ((block - offset) % self.stride == 0)
        nearest = torch.arange(block.shape[2], device=block.device) < self.local
        return columns, nearest.expand_as(columns), None

    def share(self, tokens: int) -> float:
        near = (self.sinks + self.local) * self.block
        if tokens <= near:
            return 1.0
        banded = banded_share(tokens, near)
        return banded + (1 - banded) / self.stride


@dataclass(frozen=True)
class ChunkedBlocks(StaticBlocks):
    """The own chunk and the ``previous`` ones before it; the first ``prefix`` tokens, which all read, are before them.

    The last ``question`` tokens read everything. chunk: blocks of a chunk. Prefix and question are rounded up to
    blocks. The prefill of Video-XL-2.
    """

    chunk: int = 8
    previous: int = 3
    prefix: int = 64
    question: int = 64

    def flags(
        self, block: Tensor, heads: int, tokens: int, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        number = torch.arange(block.shape[2], device=block.device)
        begin = 0 if first is None else first[:, None, None]
        columns = (block >= 0) & (number * self.block < begin + self.prefix) & (self.prefix > 0)
        asking = ((number + 1) * self.block > tokens - self.question) & (self.question > 0)
        chunk = (block - columns.sum(-1, keepdim=True)) // self.chunk
        pairs = (chunk[..., :, None] - chunk[..., None, :] <= self.previous) | asking[:, None]
        return columns, torch.zeros_like(columns), pairs

    def share(self, tokens: int) -> float:
        size = self.chunk * self.block
        prefix, question = (-(-count // self.block) * self.block for count in (self.prefix, self.question))
        if tokens <= prefix + (self.previous + 1) * size + self.question:
            return 1.0
        # On average half of the own chunk lies before a query; the last ones read the rest, too.
        seen = prefix + self.previous * size + size // 2
        beyond = max(0, tokens - seen)
        asking = min(question, beyond)
        return banded_share(tokens, seen) + 2 * asking * (beyond - asking / 2) / tokens**2
