"""Attention of a batch whose rows begin with the same tokens: the prefix is read once, for the queries of all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import reference, registry
from .spec import AttentionSpec


@dataclass(frozen=True)
class Level:
    """A prefix that groups of neighbouring rows share: keys and values of the spec's formats.

    keys, values: buffers of batch size ``entries``, which divides the batch; row b reads entry ``b // (B / entries)``.
    tokens: filled slots. A hierarchy is a list of levels, the one shared by most rows first.
    """

    keys: Tensor
    values: Tensor
    tokens: int

    @property
    def entries(self) -> int:
        """Number of different prefixes in the level."""
        return self.keys.shape[0]


def unsupported(spec: AttentionSpec) -> str | None:
    """Why attention of ``spec`` cannot read a prefix apart from the rest, in one line; None when it can."""
    if spec.window is not None:
        return f"a window of {spec.window} tokens reaches into the prefix"
    if spec.index != "contiguous" or spec.mass or spec.positions or spec.head_windows:
        return "a shared prefix is read whole: no lists, positions, windows of heads or mass"
    return None


def specs(spec: AttentionSpec) -> tuple[AttentionSpec, AttentionSpec]:
    """The specs of the two kernels that ``spec`` is made of: over the rows' own tokens, and over a prefix.

    Every query comes after the prefix, which is attended without a causal mask. Raises ``ValueError`` for specs whose
    windows or lists would reach into a prefix.
    """
    reason = unsupported(spec)
    if reason is not None:
        raise ValueError(f"{reason}; found {spec.key()}")
    return replace(spec, lse=True), replace(spec, lse=True, causal=False)


def attend(
    own: Callable[..., Any],
    shared: Callable[..., Any],
    levels: Sequence[Level],
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Append to the rows' own buffers and attend to every level and to them (Hydragen, arXiv 2402.05099). Exact.

    own, shared: kernels of the two ``specs``. q: ``[B, H, Q, D]``. k_new, v_new, k_buf, v_buf, lens: as in
    ``reference.decode_attention``, of the tokens behind the prefixes. mask: ``[B | 1, H | 1, Q, columns]``, columns of
    the levels first. The queries of the rows that share a prefix are stacked, each with its own row of the mask: a
    prefix costs its bytes once for each entry instead of once for each row. Returns ``[B, H, Q, D]`` in q's dtype.
    Raises ``ValueError`` for batches that the entries do not divide.
    """
    batch, first = q.shape[0], 0
    parts: list[Part] = []
    for level in levels:
        if batch % level.entries:
            raise ValueError(f"{level.entries} prefixes cannot be shared evenly by {batch} rows")
        if level.tokens:
            seen = None if mask is None else mask[..., first : first + level.tokens].expand(batch, -1, -1, -1)
            seen = None if seen is None else _stacked(seen, level.entries)
            lens_of_level = torch.tensor([0, level.tokens, level.tokens])
            stacked = _stacked(q, level.entries)
            out, lse = shared(stacked, None, None, level.keys, level.values, lens_of_level, seen, None)
            parts.append(Part(out, lse, batch // level.entries))
            first += level.tokens
    out, lse = own(q, k_new, v_new, k_buf, v_buf, lens, None if mask is None else mask[..., first:], None)
    parts.append(Part(out, lse, 1))
    return registry.merge(q.device.type)(parts, q)


def _stacked(x: Tensor, entries: int) -> Tensor:
    """``[B, H, Q, D]`` with the rows that share an entry one after another: ``[entries, H, B / entries * Q, D]``."""
    batch, heads, n, dim = x.shape
    rows = x.unflatten(0, (entries, batch // entries)).transpose(1, 2)
    return rows[:, :, :, 0] if n == 1 else rows.reshape(entries, heads, batch // entries * n, dim)


@dataclass(frozen=True)
class Part:
    """Attention over some of the keys: out ``[B / share, H, share * Q, D]``, lse float32 without the last dimension."""

    out: Tensor
    lse: Tensor
    share: int


Merge = Callable[[Sequence[Part], Tensor], Tensor]


def merge(parts: Sequence[Part], q: Tensor, combine: Callable[..., tuple[Tensor, Tensor]] = reference.merge) -> Tensor:
    """Attention like q over the keys of all parts; ``combine`` merges pairs of attention and log-sum-exp."""
    n = q.shape[2]

    def spread(x: Tensor, share: int) -> Any:
        return x.unflatten(2, (share, n)).transpose(1, 2).flatten(0, 1)

    return combine([(spread(part.out, part.share), spread(part.lse, part.share)) for part in parts])[0]
