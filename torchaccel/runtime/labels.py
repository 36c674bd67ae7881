"""Selection of tokens by a few channels of their keys, which generated kernels keep and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torchaccel.kernels import registry
from torchaccel.kernels.selection_spec import SelectionSpec, SummarySpec
from torchaccel.kernels.spec import dtype_name

from .eviction import State
from .selection import Call, Selection, Shapes, Sizes


@dataclass(frozen=True)
class LabelSelection(Selection):
    """The ``entries`` tokens whose labels, some channels of a key, have the greatest product with the query's.

    The newest token is one of them. labelled: channels of a label. total: of a key. chosen: the channels of each KV
    head, ``labelled`` numbers each; without any, every row takes those in which the keys of its first call are largest
    on average. reduce: how the query heads of a KV head agree.
    State: ``labels`` ``[B, H_kv, C, labelled]`` in the keys' dtype, ``channels`` int32 ``[B, H_kv, labelled]``.
    """

    entries: int
    labelled: int
    total: int
    chosen: tuple[tuple[int, ...], ...] = ()
    reduce: Literal["max", "mean", "softmax"] = "max"
    unit: ClassVar[Literal["blocks", "tokens"]] = "tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", tuple(tuple(head) for head in self.chosen))  # lists where read from a key

    @property
    def adopts(self) -> bool:
        return True

    @property
    def covers(self) -> int:
        return self.entries

    @property
    def listed(self) -> int:
        return self.entries

    @property
    def share(self) -> float:
        return self.labelled / (2 * self.total)

    def width(self, state: State) -> int:
        return self.entries

    def tensors(self, sizes: Sizes) -> Shapes:
        heads = sizes.batch, sizes.heads
        return {
            "labels": ((*heads, sizes.capacity, self.labelled), sizes.dtype),
            "channels": ((*heads, self.labelled), torch.int32),
        }

    def append(self, state: State, call: Call) -> None:
        self._label(state, call.keys, call.lens)

    def choose(self, state: State, call: Call) -> Tensor:
        group = call.q.shape[1] // call.keys.shape[1]
        run = _select(self, dtype_name(call.keys.dtype), dtype_name(call.q.dtype), group, call.q.device.type)
        listed: Tensor = run(call.q, state["labels"], call.grown, state["first"], state["channels"])
        return listed

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        if good < end:
            self._label(state, read(good, end), torch.tensor([0, good, good]))

    def _label(self, state: State, keys: Tensor, lens: Tensor) -> None:
        """Label ``keys`` of the slots from ``lens[1]`` on."""
        end = int(lens[1])
        # Rows without a token so far: in steps, never.
        if end == 0 or keys.shape[2] > 1:
            self._find_channels(state, keys, end)
        run = _summarise(self, dtype_name(keys.dtype), keys.device.type)
        run(keys, state["labels"], _no_sums(keys.device), lens, state["first"], state["channels"])

    def _find_channels(self, state: State, keys: Tensor, end: int) -> None:
        channels, first = state["channels"], state["first"]
        if self.chosen:
            channels.copy_(torch.tensor(self.chosen, dtype=torch.int32))
            return
        live = torch.arange(end, end + keys.shape[2], device=keys.device) >= first[:, None]
        size = (keys.abs() * live[:, None, :, None]).sum(2, dtype=torch.float32)
        own = size.argsort(dim=-1, descending=True, stable=True)[..., : self.labelled].int()
        channels.copy_(torch.where((first >= end)[:, None, None], own, channels))

    def _summary(self, dtype: str) -> SummarySpec:
        return SummarySpec("channels", self.total, dtype, dtype, 1, self.labelled)


@lru_cache(maxsize=8)
def _no_sums(device: torch.device) -> Tensor:
    """Sums are of means; labels have none."""
    return torch.empty(0, device=device)


@lru_cache(maxsize=256)
def _summarise(policy: LabelSelection, dtype: str, device: str) -> Callable[..., None]:
    return registry.summarise(policy._summary(dtype), device).run


@lru_cache(maxsize=256)
def _select(policy: LabelSelection, stored: str, dtype: str, group: int, device: str) -> Callable[..., Tensor]:
    scale = policy.total**-0.5
    spec = SelectionSpec(policy._summary(stored), group, dtype, policy.entries, policy.reduce, scale, recent=1)
    return registry.select(spec, device).run
