"""What a policy that retrieves is told, and what it decides: which of the stored tokens a decode step reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchaccel.kernels import ops
from torchaccel.kernels.reference import first_column

from .eviction import Prompt, State

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Sizes:
    """Of a cache that carries the state of a policy: batch rows, KV heads, slots, and the keys' head dim and dtype."""

    batch: int
    heads: int
    capacity: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """New tokens of a layer, before they are appended.

    q: ``[B, H, n, D]``. keys: ``[B, H_kv, n, D]``, both after rotary embedding. lens: int64 ``[3]`` on the CPU, as of
    ``reference.decode_attention``. mask: that of the attention, or None. ids: int64 ``[B, n]``, of the tokens, where
    the policy asks for them and the graph knows them.
    """

    q: Tensor
    keys: Tensor
    lens: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None

    @property
    def grown(self) -> Tensor:
        """``lens`` with the new tokens."""
        n = self.keys.shape[2]
        return self.lens + torch.tensor([0, n, n])


class Selection:
    """Which tokens of a layer's cache a step reads; all of them stay. Subclasses are frozen dataclasses of numbers.

    They guard compiled graphs and stand in them by ``key()``. A graph calls a policy through one operator, which runs
    ``append`` for all new tokens and ``choose`` for a single one; several new tokens attend to everything.
    The state is a set of tensors that the storage of the keys carries, rows first; what grows with the cache grows
    along the third dimension. Of it every policy has ``first``, int64 ``[B]``: the slots of a row before its first real
    token (left padding).
    unit, block: what an entry of a list stands for, a block of so many slots or a token. covers: stored tokens up to
    which a list names everything, so that none is made. listed, share: tokens that are read at most, and the part
    of the stored bytes that is read besides; the cost model goes by their sum. token_ids: the tokens' ids are wanted.
    """

    unit: ClassVar[Literal["blocks", "tokens"]] = "blocks"
    block: int = 64
    covers: int = 0
    listed: int = 0
    share: float = 0.0
    token_ids: bool = False

    @property
    def adopts(self) -> bool:
        """Whether keys alone are enough to begin with, so that a cache made elsewhere can be continued."""
        return False

    def tensors(self, sizes: Sizes) -> Shapes:
        """Shape and dtype of every tensor of the state but ``first``."""
        return {}

    def width(self, state: State) -> int:
        """Entries of a list; of the state only shapes may be read."""
        raise NotImplementedError

    def begin(self, state: State, prompt: Prompt, keys: Tensor, kept: Tensor | None) -> None:
        """Fill ``state`` (all zeros but ``first``) for a prompt of which ``keys`` ``[B, H_kv, n, D]`` are stored.

        kept: their columns int64 ``[B, H_kv, n]``; None when all of them are.
        """
        self.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))

    def adopt(self, state: State, keys: Tensor, valid: Tensor) -> None:
        """Fill ``state`` as ``begin`` for ``keys`` ``[B, H_kv, S, D]`` of which nothing else is known.

        valid: bool ``[B, S]``, False for padding.
        """
        self.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))

    def append(self, state: State, call: Call) -> None:
        """Bring ``state`` up to date, in place."""
        raise NotImplementedError

    def choose(self, state: State, call: Call) -> Tensor:
        """The list of a single new token, int32 ``[B, H_kv, width]``, -1 for no entry; the new token is read anyway."""
        raise NotImplementedError

    def restore(self, state: State, read: Callable[[int, int], Tensor], good: int, end: int) -> None:
        """Make ``state``, which is right for slots before ``good``, that of slots before ``end``.

        read: the keys of slots from .. to, ``[B, H_kv, n, D]``.
        """
        raise NotImplementedError

    def shapes(self, sizes: Sizes) -> Shapes:
        """Shape and dtype of every tensor of the state."""
        return {"first": ((sizes.batch,), torch.int64)} | self.tensors(sizes)

    def allocate(self, sizes: Sizes, device: torch.device) -> State:
        """A state of zeros."""
        made = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in self.shapes(sizes).items()
        }
        return made

    def key(self) -> str:
        """Canonical JSON of the class and its fields."""
        name = f"{type(self).__module__}:{type(self).__qualname__}"
        return json.dumps([name, asdict(self)], sort_keys=True, separators=(",", ":"))  # type: ignore[call-overload]

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> Selection:
        """The policy whose ``key()`` is ``key``."""
        name, fields = json.loads(key)
        module, _, kind = name.partition(":")
        policy: Selection = getattr(import_module(module), kind)(**fields)
        return policy


def copied(policy: Selection, state: State, sizes: Sizes, rows: Tensor | None) -> State:
    """The state of ``rows`` int64 ``[B']`` (None for all) in tensors for ``sizes``."""
    made = policy.allocate(sizes, state["first"].device)
    for name, x in state.items():
        old, new = x if rows is None else x.index_select(0, rows), made[name]
        new[tuple(slice(min(sides)) for sides in zip(old.shape, new.shape, strict=True))].copy_(
            old[tuple(slice(min(sides)) for sides in zip(old.shape, new.shape, strict=True))]
        )
    return made


@lru_cache(maxsize=1)
def operator() -> Any:
    """``torchaccel::retrieve``, defined on first use: the state of a layer brought up to date, and its list.

    Up to ``least`` stored tokens, the new ones included, and for several new tokens, the list is not made: attention
    reads everything then.
    """
    lib = ops.library()
    lib.define(
        "retrieve(Tensor q, Tensor k_new, Tensor(a!)[] state, Tensor lens, Tensor? mask, Tensor? ids, int least, "
        "str policy) -> Tensor"
    )
    for key in ("CPU", "CUDA"):
        lib.impl("retrieve", _retrieve, key)
    torch.library.register_fake("torchaccel::retrieve", _retrieve_fake, lib=lib)
    return torch.ops.torchaccel.retrieve.default


@lru_cache(maxsize=1)
def adoption() -> Any:
    """``torchaccel::adopt``, defined on first use: the state of a layer made from plain keys that a cache brings along.

    Its mask is that of the attention, of which new tokens are the last columns.
    """
    lib = ops.library()
    lib.define("adopt(Tensor keys, Tensor(a!)[] state, Tensor? mask, str policy) -> ()")
    for key in ("CPU", "CUDA"):
        lib.impl("adopt", _adopt, key)
    torch.library.register_fake("torchaccel::adopt", lambda keys, state, mask, policy: None, lib=lib)
    return torch.ops.torchaccel.adopt.default


@lru_cache(maxsize=1024)
def _names(key: str) -> tuple[Selection, tuple[str, ...]]:
    policy = Selection.from_key(key)
    return policy, tuple(policy.shapes(Sizes(1, 1, 1, 8, torch.float32)))


def _retrieve(
    q: Tensor,
    k_new: Tensor,
    state: list[Tensor],
    lens: Tensor,
    mask: Tensor | None,
    ids: Tensor | None,
    least: int,
    key: str,
) -> Tensor:
    policy, names = _names(key)
    named = dict(zip(names, state, strict=True))
    call = Call(q, k_new, lens, mask, ids)
    n = q.shape[2]
    if n > 1 and mask is not None:
        _find_first(named["first"], call)
    policy.append(named, call)
    if n > 1 or int(lens[1]) + n <= least:
        return q.new_empty((q.shape[0], k_new.shape[1], policy.width(named)), dtype=torch.int32)
    return policy.choose(named, call)


def _adopt(keys: Tensor, state: list[Tensor], mask: Tensor | None, key: str) -> None:
    policy, names = _names(key)
    named, tokens = dict(zip(names, state, strict=True)), keys.shape[2]
    for x in state:
        x.zero_()
    named["first"].copy_(first_column(mask, keys.device).clamp(max=tokens))
    valid = torch.arange(tokens, device=keys.device) >= named["first"][:, None]
    policy.adopt(named, keys, valid)


def _retrieve_fake(
    q: Tensor,
    k_new: Tensor,
    state: list[Tensor],
    lens: Tensor,
    mask: Tensor | None,
    ids: Tensor | None,
    least: int,
    key: str,
) -> Tensor:
    policy, names = _names(key)
    width = policy.width(dict(zip(names, state, strict=True)))
    return q.new_empty((q.shape[0], k_new.shape[1], width), dtype=torch.int32)


def _find_first(first: Tensor, call: Call) -> None:
    """Rows of which nothing but padding was stored so far (a prompt in chunks) may have more of it."""
    start, end, logical = call.lens.tolist()
    if call.mask is not None and end - start == logical:
        found = first_column(call.mask, first.device).expand_as(first)
        first.copy_(torch.where(first == end, found, first))
