"""Where the keys and values an attention reads come from, and where they are kept for the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from .nodes import argument, arguments, op_name, shape, sizes, writes_in_place
from .streams import projection_inputs, shares_stream

CacheKind = Literal["none", "fresh", "concatenated", "sliced", "static", "cross", "unknown"]


@dataclass(frozen=True)
class CacheSite:
    """The keys, or the values, of one attention: ``past`` and ``new`` make ``full``; ``stored`` goes to the next step.

    kind: "none": this step's only, not kept (encoders). "fresh": this step's only, and kept (prefill, empty cache).
    "concatenated": ``cat([past, new])``. "sliced": as "fresh" (past is None) or "concatenated", but only the last
    ``window - 1`` positions are kept (sliding-window layers). "static": written in place into a preallocated buffer
    (StaticCache); ``past`` is that buffer, or None when attention reads nothing but this step's tokens. "cross": of
    another sequence (encoder-decoder attention). "unknown": read from a cache in a way not understood.
    past: node of the earlier tokens ``[B, H_kv, S, D]`` (a placeholder; for "static" the whole buffer), or None.
    new: node of this step's ``[B, H_kv, Q, D]``; for "cross" and "unknown", the node attention reads.
    full: node attention reads, ``[B, H_kv, K, D]``. stored: node the graph returns, None when nothing is returned (a
    static cache that came in is changed in place). window: tokens a query of a sliding-window layer sees, itself
    included (for "static" known only once the window overflows). write: the in-place write of a static cache.
    write_positions: int64 ``[Q]``, where it writes; None for a full window, which shifts by one instead.
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
    written = _find_write(full, outputs)
    if written is not None:
        return written
    past, new = _split_cat(full)
    if past is not None and new is not None and _is_of_this_call(past, new):
        past, new = None, full
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


def _is_of_this_call(past: Node, new: Node) -> bool:
    """Whether both parts are projected from the same tokens, of which only the second part was given positions."""
    sources = projection_inputs(past)
    return bool(sources) and sources <= projection_inputs(new)


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


def _find_write(full: Node, outputs: set[Node]) -> CacheSite | None:
    """The site of a preallocated buffer that this step's tokens are written into."""
    buffer = full
    if op_name(full) == "index_copy_":
        buffer = arguments(full)[0]
    past = buffer if buffer.op == "placeholder" else None
    stored = buffer if buffer in outputs else None
    for write in buffer.users:
        if not writes_in_place(write) or arguments(write)[0] is not buffer:
            continue
        if op_name(write) == "index_copy_" and argument(write, 1, "dim") in (2, -2):
            where, new = argument(write, 2, "index"), argument(write, 3, "source")
            return CacheSite("static", past, new, full, stored, None, write, where)
        shifted = _shifted_in(argument(write, 1, "src")) if op_name(write) == "copy_" else None
        if shifted is not None:
            return CacheSite("static", past, shifted, full, stored, _positions_of(buffer), write)
        return CacheSite("unknown", past, full, full, stored, write=write)
    return _find_late_write(full, outputs)


def _shifted_in(source: object) -> Node | None:
    """New tokens of a full window: ``kept = buffer.roll(-1, 2); kept[:, :, last] = new; buffer.copy_(kept)``."""
    if op_name(source) != "roll" or not isinstance(source, Node):
        return None
    sets = [user for user in source.users if op_name(user) == "setitem" and arguments(user)[0] is source]
    return arguments(sets[0])[2] if len(sets) == 1 else None


def _find_late_write(full: Node, outputs: set[Node]) -> CacheSite | None:
    """The site of keys that attention reads whole while the last of them are copied into a sliding-window buffer."""
    for cut in full.users:
        start = _suffix_start(arguments(cut)[1]) if op_name(cut) == "getitem" else None
        for write in cut.users if start is not None else ():
            if op_name(write) == "copy_" and argument(write, 1, "src") is cut and start is not None:
                buffer = arguments(write)[0]
                stored = buffer if buffer in outputs else None
                past, new = _split_cat(full)
                if past is not None or new is not None:
                    return CacheSite("unknown", past, full, full, stored, -start, write)
                return CacheSite("static", None, full, full, stored, -start, write)
    return None


def _positions_of(buffer: Node) -> int | None:
    """Number of positions of a buffer, when it is a constant."""
    length = sizes(buffer)[2]
    return length if isinstance(length, int) else None


def _is_cross(q: Node, new: Node) -> bool:
    """Whether keys are projected from a sequence that the queries are not projected from."""
    sources, others = projection_inputs(q), projection_inputs(new)
    return bool(sources) and bool(others) and not sources & others and not shares_stream(sources, others)


def _reads_placeholder(new: Node) -> bool:
    """Whether keys come from a graph input with no projection in between: some cache, of a form not known here."""
    return not projection_inputs(new)
