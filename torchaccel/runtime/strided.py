"""Selection by position alone: sinks, recent blocks, and every few blocks between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .eviction import State
from .selection import Call, Selection, Shapes, Sizes


@dataclass(frozen=True)
class StridedSelection(Selection):
    """The first ``sinks`` blocks of a row, the last ``local`` ones, and between them every ``stride``-th.

    KV head h begins with block h modulo stride: together the heads see everything. Blocks are counted from the one that
    holds a row's first live token, as those of ``kernels.prompt_selectors.static.StridedBlocks``.
    """

    block: int = 64
    sinks: int = 1
    local: int = 16
    stride: int = 16

    @property
    def covers(self) -> int:
        return self.listed

    @property
    def listed(self) -> int:
        return (self.sinks + self.local) * self.block

    @property
    def share(self) -> float:
        return 1 / self.stride

    @property
    def adopts(self) -> bool:
        return True

    def width(self, state: State) -> int:
        return self.sinks + self.local + state["strided"].shape[2]

    def tensors(self, sizes: Sizes) -> Shapes:
        # Nothing is remembered but how many there may be, for lists that grow with the cache. Never one alone, which
        # torch would take for a size that cannot change.
        most = -(-sizes.capacity // (self.block * self.stride)) + 1
        return {"strided": ((sizes.batch, 1, most), torch.bool)}

    def append(self, state: State, call: Call) -> None:
        """Nothing depends on the tokens."""

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        """Nothing depends on the tokens."""

    def choose(self, state: State, call: Call) -> Tensor:
        device, heads = state["first"].device, call.keys.shape[1]
        begin = (state["first"] // self.block)[:, None, None]
        own = int(call.lens[1]) // self.block - begin
        between = torch.arange(state["strided"].shape[2], device=device) * self.stride
        between = between + (torch.arange(heads, device=device) % self.stride)[:, None]
        between = between.expand(len(begin), -1, -1)
        between = torch.where((between >= self.sinks) & (between <= own - self.local), between, -1)
        sinks = torch.arange(self.sinks, device=device)
        sinks = torch.where(sinks <= own - self.local, sinks, -1).expand(-1, heads, -1)
        near = own + torch.arange(1 - self.local, 1, device=device)
        near = torch.where(near >= 0, near, -1).expand(-1, heads, -1)
        listed = torch.cat([sinks, between, near], 2)
        return torch.where(listed < 0, -1, listed + begin).int()
