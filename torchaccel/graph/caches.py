"""Where the keys and values an attention reads come from, and where they are kept for the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from .nodes import argument, arguments, op_name, shape
from .streams import projection_inputs, shares_stream

CacheKind = Literal["none", "fresh", "concatenated", "sliced", "static", "cross", "unknown"]


@dataclass(frozen=True)
class CacheSite:
    """The keys, or the values, of one attention: ``past`` and ``new`` make ``full``; ``stored`` goes to the next step.

    kind: "none": this step's only, not kept (encoders). "fresh": this step's only, and kept (prefill, empty cache).
    "concatenated": ``cat([past, new])``. "sliced": as "fresh" (past is None) or "concatenated", but only the last
    ``window - 1`` positions are kept (sliding-window layers). "static": written into the buffer ``past`` at given
    positions. "cross": of another sequence (encoder-decoder attention). "unknown": read from a cache in a way not
    understood.
    past: node of the earlier tokens ``[B, H_kv, S, D]`` (a placeholder; for "static" the whole buffer), or None.
    new: node of this step's ``[B, H_kv, Q, D]``; for "cross" and "unknown", the node attention reads.
    full: node attention reads, ``[B, H_kv, K, D]``. stored: node the graph returns, None when nothing is returned (a
    static cache is changed in place). window: tokens a query of a sliding-window layer sees, itself included.
    write: the in-place write of a static cache. write_positions: int64 ``[Q]``, where it writes.
    """

    kind: CacheKind
    past: Node | None
    new: Node
    full: Node
    stored: Node | None
    window: int | None = None
    write: Node | None = None
    write_positions: Node | None = None


def find_cache(full: Node, q: Node, outputs: set[Node]) -> CacheSite:
    """The cache site of the keys or values ``full`` that an attention with queries ``q`` reads.

    outputs: the nodes the graph returns.
    """
    written = _find_write(full)
    if written is not None:
        return written
    past, new = _split_cat(full)
    if past is None and new is None:
        if full.op == "placeholder":
            return CacheSite("cross", None, full, full, None)
        new = full
    assert new is not None
    stored, window = _find_stored(full, new, outputs)
    if past is not None:
        if past.op != "placeholder":
            return CacheSite("unknown", past, new, full, stored, window)
        return CacheSite("concatenated" if window is None else "sliced", past, new, full, stored, window)
    if _is_cross(q, new):
        return CacheSite("cross", None, new, full, stored)
    if stored is None:
        return CacheSite("none" if not _reads_placeholder(new) else "unknown", None, new, full, None)
    return CacheSite("fresh" if window is None else "sliced", None, new, full, stored, window)


def _split_cat(full: Node) -> tuple[Node | None, Node | None]:
    """``(past, new)`` of ``cat([past, new], -2)``; past is None for an empty tensor, both for no such cat."""
    if op_name(full) != "cat" or argument(full, 1, "dim", 0) not in (-2, 2):
        return None, None
    parts = argument(full, 0, "tensors")
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(part, Node) for part in parts):
        return None, None
    past, new = parts
    return (None if _is_empty(past) else past), new


def _is_empty(node: Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape(node) or ())


def _find_stored(full: Node, new: Node, outputs: set[Node]) -> tuple[Node | None, int | None]:
    """The graph output that keeps ``full``, and the window when it is only its last ``window - 1`` positions."""
    for node in (full, new):
        if node in outputs:
            return node, None
    for node in (full, new):
        for user in node.users:
            if user in outputs and op_name(user) == "getitem":
                start = _suffix_start(arguments(user)[1])
                if start is not None:
                    return user, 1 - start
    return None, None


def _suffix_start(index: object) -> int | None:
    """The negative start n of ``x[:, :, n:, :]``, or None for any other index."""
    if not isinstance(index, tuple) or len(index) not in (3, 4):
        return None
    everything = slice(None, None, None)
    cut = index[2]
    if any(part != everything for place, part in enumerate(index) if place != 2) or not isinstance(cut, slice):
        return None
    plain = isinstance(cut.start, int) and cut.start < 0 and cut.stop is None and cut.step is None
    return cut.start if plain else None


def _find_write(full: Node) -> CacheSite | None:
    """The site of a buffer that ``index_copy_`` fills before attention reads it."""
    buffer = full
    if op_name(full) == "index_copy_" and isinstance(arguments(full)[0], Node):
        buffer = arguments(full)[0]
    for user in buffer.users:
        if op_name(user) == "index_copy_" and user.args[0] is buffer and argument(user, 1, "dim") in (2, -2):
            where, new = argument(user, 2, "index"), argument(user, 3, "source")
            past = buffer if buffer.op == "placeholder" else None
            return CacheSite("static", past, new, full, None, write=user, write_positions=where)
    return None


def _is_cross(q: Node, new: Node) -> bool:
    """Whether keys are projected from a sequence that the queries are not projected from."""
    sources, others = projection_inputs(q), projection_inputs(new)
    return bool(sources) and bool(others) and not sources & others and not shares_stream(sources, others)


def _reads_placeholder(new: Node) -> bool:
    """Whether keys come from a graph input with no projection in between: some cache, of a form not known here."""
    return not projection_inputs(new)
