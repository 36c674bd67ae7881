"""What the matchers of the different spellings of attention hand to the rewrite."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch.fx import Node

from torchaccel.graph.nodes import argument, arguments, op_name, rank, same_size, shape, sizes


class AttentionReason(StrEnum):
    """Why an attention was left as the model wrote it."""

    DROPOUT = "DROPOUT"
    WEIGHTS_USED = "WEIGHTS_USED"
    RANK_NOT_FOUR = "RANK_NOT_FOUR"
    CAUSAL_NOT_SQUARE = "CAUSAL_NOT_SQUARE"
    UNKNOWN_SCORES = "UNKNOWN_SCORES"
    UNKNOWN_MASK = "UNKNOWN_MASK"
    UNKNOWN_HEADS = "UNKNOWN_HEADS"


class NotCanonical(Exception):
    """Something that is attention has no canonical form."""

    def __init__(self, reason: AttentionReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class MaskTerm:
    """One mask of the model: ``node`` as it is (bool or additive), or, with ``fill``, scores replaced where it says.

    fill: the very negative number written over masked scores. keep: whether ``node`` is True where scores are kept.
    """

    node: Node
    fill: float | None = None
    keep: bool = False


@dataclass
class AttentionMatch:
    """Arguments of a canonical attention node, all of them nodes the graph already has."""

    q: Node
    k: Node
    v: Node
    scale: float
    masks: list[MaskTerm] = field(default_factory=list)
    causal: bool = False
    softcap: float | None = None


def check_heads(match: AttentionMatch) -> None:
    """Raises unless q, k, v are ``[B, H, Q, D]``, ``[B, H_kv, K, D]``, ``[B, H_kv, K, D_v]``, H a multiple of H_kv."""
    for label, node in (("q", match.q), ("k", match.k), ("v", match.v)):
        if rank(node) != 4:
            raise NotCanonical(AttentionReason.RANK_NOT_FOUR, f"{label} ({node.name}) has rank {rank(node)}")
    heads, key_heads, value_heads = ((shape(node) or ())[1] for node in (match.q, match.k, match.v))
    if not isinstance(heads, int) or not isinstance(key_heads, int) or not same_size(key_heads, value_heads):
        raise NotCanonical(AttentionReason.UNKNOWN_HEADS, f"heads q {heads}, k {key_heads}, v {value_heads}")
    if heads % key_heads:
        raise NotCanonical(AttentionReason.UNKNOWN_HEADS, f"{heads} query heads over {key_heads} key heads")


def without_repetition(k: Node, v: Node) -> tuple[Node, Node]:
    """The keys and values before ``repeat_kv``, where both were repeated alike; else the nodes given."""
    before_k, before_v = _before_repeat(k), _before_repeat(v)
    if before_k is None or before_v is None or not same_size(_heads(before_k), _heads(before_v)):
        return k, v
    return before_k, before_v


def _heads(node: Node) -> object:
    return (shape(node) or (None, None))[1]


def _before_repeat(node: Node) -> Node | None:
    """x, when the node is ``x[:, :, None].expand(...).reshape(...)`` or ``x.repeat_interleave(n, 1)``."""
    name = op_name(node)
    if name == "repeat_interleave" and argument(node, 2, "dim") in (1, -3) and rank(arguments(node)[0]) == 4:
        source = arguments(node)[0]
        return source if isinstance(source, Node) and isinstance(argument(node, 1, "repeats"), int) else None
    if name not in ("reshape", "view", "flatten"):
        return None
    wide = arguments(node)[0]
    if op_name(wide) == "contiguous":
        wide = arguments(wide)[0]
    if op_name(wide) != "expand" or rank(wide) != 5:
        return None
    thin = arguments(wide)[0]
    if not _is_unsqueezed_heads(thin):
        return None
    source = arguments(thin)[0]
    b, heads, group, n, d = sizes(wide)
    known = shape(node)
    if known is None or len(known) != 4 or not isinstance(heads, int) or not isinstance(group, int):
        return None
    same = zip(known, (b, heads * group, n, d), strict=True)
    return source if all(same_size(x, y) for x, y in same) and same_size(heads, _heads(source)) else None


def _is_unsqueezed_heads(node: Node) -> bool:
    """Whether a node is ``x[:, :, None]`` or ``x.unsqueeze(2)`` of a rank-4 tensor."""
    if rank(node) != 5 or rank(arguments(node)[0] if arguments(node) else None) != 4:
        return False
    if op_name(node) == "unsqueeze":
        return argument(node, 1, "dim") in (2, -3)
    if op_name(node) != "getitem" or not isinstance(arguments(node)[1], tuple):
        return False
    index = list(arguments(node)[1])
    everything = slice(None, None, None)
    while index and index[-1] in (everything, Ellipsis):
        index.pop()
    return index == [everything, everything, None]
