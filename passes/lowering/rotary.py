"""Finds the rotary embedding of an attention's queries and new keys, which the attention kernel can do itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node
from torchaccel.kernels.cpp.fused import MAX_ROWS

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.nodes import (
    argument,
    arguments,
    dtype,
    hint,
    op_name,
    same_shape,
    same_size,
    shape,
    sizes,
    writes_in_place,
)
from torchaccel.graph.rotary import Rotation, rotation_of

# New tokens of all sequences up to which a loop of its own costs more than rotating here: with it, a call for 4 tokens
# was 3.4 us faster, for 16 tokens 2.2 us, for 64 0.4 us slower (12 and 4 heads of 64, two threads of one EPYC core).
MOST_TOKENS = 32


@dataclass(frozen=True)
class Rotary:
    """What an attention site reads before rotary embedding.

    q ``[B, H, Q, D]``, k_new ``[B, H_kv, Q, D]``. cos, sin: ``[B | 1, Q, dim]``. style, dim: as in ``AttentionSpec``.
    """

    q: Node
    k_new: Node
    cos: Node
    sin: Node
    style: Literal["half", "interleaved"]
    dim: int


def find_rotary(site: AttentionSite) -> Rotary | None:
    """The rotary embedding that q and the new keys share and that nobody else reads, or None."""
    cache = site.key_cache
    q, k = rotation_of(site.q), rotation_of(cache.new)
    if q is None or k is None or (q.style, q.dim) != (k.style, k.dim):
        return None
    if set(q.output.users) != {site.node} or set(k.output.users) != {cache.full}:
        return None
    if dtype(q.x) != dtype(q.output) or dtype(k.x) != dtype(k.output) or not same_shape(k.x, k.output):
        return None
    cos, sin = _table(q, q.cos), _table(q, q.sin)
    if cos is None or sin is None or (cos, sin) != (_table(k, k.cos), _table(k, k.sin)) or dtype(cos) != dtype(sin):
        return None
    # They are read later than before.
    if any(writes_in_place(user) for read in (q.x, k.x, cos, sin) for user in read.users):
        return None
    return Rotary(q.x, k.x, cos, sin, q.style, q.dim)


def pays(found: Rotary, device: torch.device) -> bool:
    """Whether attention that rotates is faster than attention and what the graph makes of the rotation otherwise."""
    batch, _, tokens, _ = sizes(found.q)
    one = same_size(tokens, 1)
    if device.type != "cpu":
        return one  # of many tokens one launch may not append all
    # One token of a few sequences is rotated by the fused kernel that projects it, so no launch is saved.
    fused = one and isinstance(batch, int) and batch <= MAX_ROWS
    return not fused and (hint(batch) or 1) * (hint(tokens) or 1) <= MOST_TOKENS


def _table(rotation: Rotation, table: Node) -> Node | None:
    """``[B | 1, Q, dim]`` of a table ``x.unsqueeze(1)`` or ``x[:, None]``, or None where it is neither."""
    if op_name(table) == "getitem":
        index, everything = arguments(table)[1], slice(None)
        if not isinstance(index, tuple) or index[:2] != (everything, None) or any(i != everything for i in index[2:]):
            return None
    elif op_name(table) != "unsqueeze" or argument(table, 1, "dim") not in (1, -3):
        return None
    found = arguments(table)[0]
    of, rows = shape(found) or (), shape(rotation.x) or ()
    if len(of) != 3 or len(rows) != 4 or not same_size(of[1], rows[2]) or not same_size(of[2], rotation.dim):
        return None
    return found if same_size(of[0], 1) or same_size(of[0], rows[0]) else None
