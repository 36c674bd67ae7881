"""Attention to what the last full step attended to most, and the operator that keeps that list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchaccel.kernels import ops, registry

from .eviction import State
from .selection import Call, Selection, Shapes, Sizes, named


@dataclass(frozen=True)
class RecycledSelection(Selection):
    """One step of ``stride`` reads everything and lists the ``tokens`` that got most attention; the others read those.

    The first step after anything but a step is a full one, so that the state follows from no history. In between every
    new token takes the place of the listed one that its step attended to least, unless itself got less. The query heads
    of a KV head share a list, by the sum of their attention. Every ``check`` steps (0: never) there is a full one when
    the queries of any row are less like those of the last full one than ``similarity``, a mean of cosines.
    State: ``recycled`` int32 ``[B, H_kv, tokens]``; ``steps`` int64 ``[B]`` in host memory, since the last full one, 0
    when the next is one; ``asked`` ``[B, H, D]`` in the keys' dtype, the queries of the last full step.
    """

    tokens: int
    stride: int
    group: int
    check: int = 0
    similarity: float = 0.8
    unit: ClassVar[Literal["blocks", "tokens"]] = "tokens"
    host: ClassVar[frozenset[str]] = frozenset({"steps"})

    @property
    def adopts(self) -> bool:
        return True

    @property
    def covers(self) -> int:
        return self.tokens

    @property
    def listed(self) -> int:
        return self.tokens

    @property
    def share(self) -> float:
        return 1 / self.stride

    def width(self, state: State) -> int:
        return self.tokens

    def tensors(self, sizes: Sizes) -> Shapes:
        asked = sizes.heads * self.group if self.check else 0
        return {
            "recycled": ((sizes.batch, sizes.heads, self.tokens), torch.int32),
            "steps": ((sizes.batch,), torch.int64),
            "asked": ((sizes.batch, asked, sizes.head_dim), sizes.dtype),
        }

    def append(self, state: State, call: Call) -> None:
        state["steps"].zero_()

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        state["steps"].zero_()

    def full(self, state: State, q: Tensor) -> bool:
        """Whether a step with queries ``[B, H, 1, D]`` reads everything."""
        steps = int(state["steps"][0])
        if steps in (0, self.stride):
            return True
        if not self.check or steps % self.check:
            return False
        alike = torch.nn.functional.cosine_similarity(q[:, :, 0].float(), state["asked"].float(), dim=-1).mean(-1)
        return bool((alike < self.similarity).any())

    def learn(self, state: State, q: Tensor, mass: Tensor, end: int) -> None:
        """List anew after a full step; mass: float32 ``[B, H_kv, C]`` of slots, of which ``end`` are filled."""
        state["recycled"].copy_(mass[..., :end].topk(self.tokens, sorted=False).indices)
        state["steps"].fill_(1)
        if self.check:
            state["asked"].copy_(q[:, :, 0])

    def renew(self, state: State, mass: Tensor, end: int) -> None:
        """List the newest token, slot ``end - 1``, for the one that got the least of ``mass``, unless it got less."""
        recycled = state["recycled"]
        least, place = mass.gather(2, recycled.long()).min(-1, keepdim=True)
        old = recycled.gather(2, place)
        recycled.scatter_(2, place, torch.where(least < mass[..., end - 1 : end], end - 1, old))
        state["steps"].add_(1)


@lru_cache(maxsize=1)
def operator() -> Any:
    """``torchaccel::attend_recycled``, defined on first use: a step's attention, and what it teaches ``policy``.

    By ``plan`` over the list, by ``whole`` over everything: on full steps, and up to ``least`` stored tokens, the new
    one included. Both have the attention that tokens received as a side result.
    """
    lib = ops.library()
    lib.define(
        "attend_recycled(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_buf, Tensor(b!) v_buf, Tensor lens, "
        "Tensor? mask, Tensor(c!)? positions, Tensor(d!)[] state, int least, str policy, str plan, str whole) -> Tensor"
    )
    for key in ("CPU", "CUDA"):
        lib.impl("attend_recycled", _attend, key)
    torch.library.register_fake("torchaccel::attend_recycled", _attend_fake, lib=lib)
    return torch.ops.torchaccel.attend_recycled.default


def _attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    state: list[Tensor],
    least: int,
    key: str,
    plan: str,
    whole: str,
) -> Tensor:
    policy, found = named(key, state)
    assert isinstance(policy, RecycledSelection)
    args = (q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
    end = int(lens[1]) + 1
    out: Tensor
    if end <= least:
        found["steps"].zero_()
        out, _ = registry.attend(whole)(*args)
    elif policy.full(found, q):
        out, mass = registry.attend(whole)(*args)
        policy.learn(found, q, mass, end)
    else:
        out, mass = registry.attend(plan)(*args, found["recycled"])
        policy.renew(found, mass, end)
    return out


def _attend_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
