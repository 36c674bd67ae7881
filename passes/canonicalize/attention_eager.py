"""Reads attention written out: matmul, scale, softcap, mask, softmax, dropout, matmul."""

from __future__ import annotations

import torch
from torch.fx import Node

from torchaccel.graph.nodes import CASTS, argument, arguments, dtype, is_number, op_name, rank, same_shape, shape

from .attention_match import AttentionMatch, AttentionReason, MaskTerm, NotCanonical

_UNCHANGED = frozenset({"contiguous", "clone"})


def last_matmul(softmax: Node) -> Node | None:
    """The matmul of a softmax's result with the values, past casts and dropout; None when this is no attention."""
    if argument(softmax, 1, "dim") not in (-1, 3) or _first_matmul(arguments(softmax)[0]) is None:
        return None
    pending, seen = [softmax], {softmax}
    while pending:
        node = pending.pop()
        for user in node.users:
            if op_name(user) in ("matmul", "bmm") and arguments(user)[0] is node:
                return user
            if user not in seen and _keeps_values(user, node):
                seen.add(user)
                pending.append(user)
    return None


def read_eager(softmax: Node, last: Node) -> AttentionMatch:
    """Arguments of the attention around a softmax whose result ends in ``last``; raises NotCanonical."""
    _check_weights(softmax, last)
    match = _read_scores(arguments(softmax)[0])
    v = arguments(last)[1]
    if not isinstance(v, Node) or rank(v) != 4 or rank(match.q) != 4:
        raise NotCanonical(AttentionReason.RANK_NOT_FOUR, f"q has rank {rank(match.q)}, v has rank {rank(v)}")
    match.v = v
    return match


def _keeps_values(node: Node, source: Node) -> bool:
    """Whether a node only casts, copies or drops out ``source``."""
    name = op_name(node)
    return (
        bool(arguments(node))
        and arguments(node)[0] is source
        and (name in CASTS | _UNCHANGED or name in ("dropout", "dropout_"))
    )


def _check_weights(softmax: Node, last: Node) -> None:
    """Raises unless the softmax result goes to ``last`` alone, with no dropout on the way."""
    node = arguments(last)[0]
    while True:
        if len(node.users) > 1:
            raise NotCanonical(AttentionReason.WEIGHTS_USED, f"{node.name} has {len(node.users)} users")
        if op_name(node) in ("dropout", "dropout_"):
            dropped, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
            if dropped != 0.0 and training is not False:
                raise NotCanonical(AttentionReason.DROPOUT, f"{node.name} drops {dropped}")
        if node is softmax:
            return
        node = arguments(node)[0]


def _first_matmul(node: object) -> Node | None:
    """The matmul ``q k^T`` behind scores, through everything that is done to scores before the softmax."""
    pending, seen = [node], set()
    while pending:
        found = pending.pop()
        if not isinstance(found, Node) or found in seen:
            continue
        seen.add(found)
        name = op_name(found)
        if name in ("matmul", "bmm", "baddbmm"):
            return found
        if name in CASTS or name in ("mul", "div", "tanh", "add", "add_", "sub", "masked_fill", "contiguous"):
            pending.extend(arguments(found)[:2])
        elif name == "where":
            pending.append(argument(found, 1, "input"))
    return None


def _read_scores(node: Node) -> AttentionMatch:
    """Walks from the softmax's input back to ``q k^T``: masks first, then the softcap, then scales."""
    masks: list[MaskTerm] = []
    softcap: float | None = None
    scale = 1.0
    while True:
        name = op_name(node)
        if name in CASTS or name in _UNCHANGED:
            node = arguments(node)[0]
        elif name == "matmul":
            break
        elif name in ("add", "add_", "masked_fill", "where"):
            if softcap is not None or scale != 1.0:
                raise NotCanonical(AttentionReason.UNKNOWN_MASK, f"{node.name} masks before the scale or softcap")
            node, term = _read_mask(node)
            masks.append(term)
        elif name in ("mul", "div"):
            node, factor = _read_factor(node)
            inner = _past_casts(node)
            if op_name(inner) == "tanh" and softcap is None and scale == 1.0:
                node = _past_casts(arguments(inner)[0])
                if op_name(node) not in ("mul", "div"):
                    raise NotCanonical(AttentionReason.UNKNOWN_SCORES, f"{inner.name} is not a softcap")
                node, inside = _read_factor(node)
                if abs(factor * inside - 1.0) > 1e-6:
                    raise NotCanonical(AttentionReason.UNKNOWN_SCORES, f"softcap {factor} of scores scaled {inside}")
                softcap = factor
            else:
                scale *= factor
        else:
            raise NotCanonical(AttentionReason.UNKNOWN_SCORES, f"{node.name} ({node.target}) between q k^T and softmax")
    q, before_q = _past_factors(arguments(node)[0])
    transposed, before_k = _past_factors(arguments(node)[1])
    k = _untransposed(transposed)
    if k is None:
        raise NotCanonical(AttentionReason.UNKNOWN_SCORES, f"{transposed.name} is not a transpose of the keys")
    k, again = _past_factors(k)
    return AttentionMatch(q, k, k, scale * before_q * before_k * again, masks, softcap=softcap)


def _past_casts(node: Node) -> Node:
    while op_name(node) in CASTS:
        node = arguments(node)[0]
    return node


def _read_factor(node: Node) -> tuple[Node, float]:
    """The tensor and the number of ``x * c``, ``c * x`` or ``x / c``; raises NotCanonical."""
    found = _factor(node)
    if found is None:
        raise NotCanonical(AttentionReason.UNKNOWN_SCORES, f"{node.name} scales by something that is not a number")
    return found


def _factor(node: Node) -> tuple[Node, float] | None:
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if op_name(node) == "mul" and is_number(left) and isinstance(right, Node):
        return right, float(left)
    if not isinstance(left, Node) or not is_number(right) or node.kwargs.get("rounding_mode"):
        return None
    if op_name(node) == "mul":
        return left, float(right)
    return (left, 1.0 / float(right)) if right else None


def _past_factors(node: Node) -> tuple[Node, float]:
    """A tensor before multiplications by numbers, and their product."""
    factor = 1.0
    while op_name(node) in ("mul", "div"):
        found = _factor(node)
        if found is None:
            break
        node, number = found
        factor *= number
    return node, factor


def _untransposed(node: Node) -> Node | None:
    """k of ``k.transpose(-1, -2)`` or ``k.permute(0, 1, 3, 2)``, or None."""
    name = op_name(node)
    if name == "transpose":
        swapped = {d % 4 for d in (argument(node, 1, "dim0"), argument(node, 2, "dim1")) if isinstance(d, int)}
        return arguments(node)[0] if swapped == {2, 3} and rank(node) == 4 else None
    if name == "permute":
        order = arguments(node)[1] if isinstance(arguments(node)[1], tuple | list) else arguments(node)[1:]
        return arguments(node)[0] if tuple(order) in ((0, 1, 3, 2), (0, 1, -1, -2)) else None
    return None


def _read_mask(node: Node) -> tuple[Node, MaskTerm]:
    """The scores and the mask of ``scores + mask``, ``scores.masked_fill(m, min)`` or ``where(m, scores, min)``."""
    name = op_name(node)
    if name in ("add", "add_"):
        left, right = arguments(node)[:2]
        if node.kwargs.get("alpha", 1) != 1 or not isinstance(left, Node) or not isinstance(right, Node):
            raise NotCanonical(AttentionReason.UNKNOWN_MASK, f"{node.name} adds {right}")
        if _first_matmul(left) is None or not same_shape(left, node):
            left, right = right, left
        return left, MaskTerm(right)
    if name == "masked_fill":
        scores, where, fill = (argument(node, i, key) for i, key in enumerate(("input", "mask", "value")))
        keep = False
    else:
        where, scores, fill = (argument(node, i, key) for i, key in enumerate(("condition", "input", "other")))
        keep = True
    lowest = torch.finfo(dtype(node) or torch.float32).min
    if not isinstance(scores, Node) or not isinstance(where, Node) or not is_number(fill) or fill > lowest / 2:
        raise NotCanonical(AttentionReason.UNKNOWN_MASK, f"{node.name} fills with {fill}, not with the lowest number")
    if not same_shape(scores, node) or shape(where) is None:
        raise NotCanonical(AttentionReason.UNKNOWN_MASK, f"{node.name} broadcasts the scores")
    return scores, MaskTerm(where, float(fill), keep)
