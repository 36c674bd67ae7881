"""Selection by overlapping windows of keys, whose weights the query heads of a KV head add up (InfLLM v2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchaccel.kernels.semantic_blocks import semantic_blocks

from .eviction import State
from .selection import Call, Selection, Shapes, Sizes
from .summaries import SummarySelection


@dataclass(frozen=True)
class SemanticSelection(Selection):
    """The ``entries`` best blocks by ``semantic_blocks``; up to ``dense`` tokens a step reads everything.

    The state is the mean of every ``stride`` keys: a window's mean is that of two neighbours, and so are its scores.
    """

    entries: int
    local: int = 32
    sinks: int = 1
    block: int = 64
    stride: int = 16
    dense: int = 8192

    @property
    def adopts(self) -> bool:
        return True

    @property
    def covers(self) -> int:
        return max(self.dense, self.entries * self.block)

    @property
    def listed(self) -> int:
        return self.entries * self.block

    @property
    def share(self) -> float:
        return self._means.share

    def width(self, state: State) -> int:
        return self.entries

    def tensors(self, sizes: Sizes) -> Shapes:
        return self._means.tensors(sizes)

    def append(self, state: State, call: Call) -> None:
        self._means.append(state, call)

    def choose(self, state: State, call: Call) -> Tensor:
        tokens, heads, first = int(call.grown[1]), call.keys.shape[1], state["first"]
        strides = tokens // self.stride
        q = call.q.unflatten(1, (heads, -1)).squeeze(3).float()  # [B, H_kv, G, D]
        scores = q @ state["summary"][:, :, :strides].float().transpose(2, 3) * q.shape[3] ** -0.5
        scores = (scores[..., 1:] + scores[..., :-1]) / 2
        dead = torch.arange(max(strides - 1, 0), device=q.device) < -(-first // self.stride)[:, None]
        weights = scores.masked_fill(dead[:, None, None], -torch.inf).softmax(-1).nan_to_num(0).sum(2, keepdim=True)
        own = torch.tensor([(tokens - 1) // self.block], device=q.device)
        ratio = self.block // self.stride
        lists = semantic_blocks(weights, own, first // self.block, ratio, self.entries, self.sinks, self.local)
        return lists[:, :, 0]

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        self._means.restore(state, read, good, end)

    @property
    def _means(self) -> SummarySelection:
        return SummarySelection("mean", 1, self.stride)
