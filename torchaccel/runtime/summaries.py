"""Selection by summaries of blocks of keys, which generated kernels keep and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from torchaccel.kernels import registry
from torchaccel.kernels.selection_spec import SelectionSpec, SummarySpec
from torchaccel.kernels.spec import dtype_name

from .eviction import State
from .selection import Call, Selection, Shapes, Sizes


@dataclass(frozen=True)
class SummarySelection(Selection):
    """The ``entries`` best blocks of ``block`` slots by a summary of their keys; see ``SelectionSpec`` for the rest.

    The first ``sinks`` and the last ``recent`` blocks are among them. reduce: how the query heads of a KV head agree.
    pool: summaries of a block, of as many slots each; the best of them stands for it.
    """

    kind: Literal["minmax", "mean"]
    entries: int
    block: int = 64
    sinks: int = 0
    recent: int = 1
    reduce: Literal["max", "mean", "softmax"] = "max"
    pool: int = 1

    @property
    def adopts(self) -> bool:
        return True

    @property
    def covers(self) -> int:
        return self.entries * self.block

    @property
    def listed(self) -> int:
        return self.entries * self.block

    @property
    def share(self) -> float:
        # A summary has one or two rows for the keys and values of a block.
        return (1.0 if self.kind == "minmax" else 0.5) * self.pool / self.block

    def width(self, state: State) -> int:
        return self.entries

    def tensors(self, sizes: Sizes) -> Shapes:
        rows, spec = (
            summary_rows(sizes.capacity, self.block // self.pool),
            self._summary(sizes.head_dim, dtype_name(sizes.dtype)),
        )
        sums = sizes.head_dim if self.kind == "mean" else 0
        return {
            "summary": ((sizes.batch, sizes.heads, rows, *spec.row), sizes.dtype),
            "sums": ((sizes.batch, sizes.heads, sums), torch.float32),
        }

    def append(self, state: State, call: Call) -> None:
        self._summarise(state, call.keys, call.lens)

    def choose(self, state: State, call: Call) -> Tensor:
        heads, dim = call.q.shape[1], call.q.shape[3]
        run = _select(self, dim, dtype_name(call.q.dtype), heads // call.keys.shape[1], call.q.device.type)
        listed: Tensor = run(call.q, state["summary"], call.grown, state["first"])
        return listed

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        # What a block lost cannot be taken out of its summary: it is made anew.
        begin = min(good, end) // self.block * self.block
        self._summarise(state, read(begin, end), torch.tensor([0, begin, begin]))

    def _summarise(self, state: State, keys: Tensor, lens: Tensor) -> None:
        run = _summarise(self, keys.shape[3], dtype_name(keys.dtype), keys.device.type)
        run(keys, state["summary"], state["sums"], lens, state["first"])

    def _summary(self, head_dim: int, dtype: str) -> SummarySpec:
        return SummarySpec(self.kind, head_dim, dtype, dtype, self.block // self.pool)


def summary_rows(capacity: int, block: int) -> int:
    """Rows of a summary: never one alone, which torch would take for a size that cannot change."""
    return (capacity + block - 1) // block + 1


@lru_cache(maxsize=256)
def _summarise(policy: SummarySelection, head_dim: int, dtype: str, device: str) -> Callable[..., None]:
    return registry.summarise(policy._summary(head_dim, dtype), device).run


@lru_cache(maxsize=256)
def _select(policy: SummarySelection, head_dim: int, dtype: str, group: int, device: str) -> Callable[..., Tensor]:
    summary = policy._summary(head_dim, dtype)
    spec = SelectionSpec(
        summary, group, dtype, policy.entries, policy.reduce, head_dim**-0.5, policy.pool, policy.sinks, policy.recent
    )
    return registry.select(spec, device).run
