"""Which dimension of a tensor is the sequence, followed through views that merge and split dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy

from .nodes import expression

Role = Literal["batch", "sequence", "tail", "other"]


@dataclass(frozen=True)
class Factor:
    """A run of positions: a dimension is the product of its factors, the first one slowest.

    size: an int or a SymPy expression. role: what its positions count; "tail" is the last few of the sequence.
    """

    size: Any
    role: Role = "other"


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def dim(size: Any, role: Role = "other") -> Dim:
    """A dimension of one factor; size one has none, whatever it counts."""
    size = expression(size)
    return () if size == 1 else (Factor(size, role),)


def others(sizes: tuple[Any, ...]) -> Layout:
    """The layout of a tensor whose dimensions count nothing of interest."""
    return tuple(dim(size) for size in sizes)


def has_sequence(d: Dim) -> bool:
    """Whether a dimension counts sequence positions, alone or merged with something else."""
    return any(factor.role == "sequence" for factor in d)


def is_sequence(d: Dim) -> bool:
    """Whether a dimension counts sequence positions alone."""
    return len(d) == 1 and d[0].role == "sequence"


def total(d: Dim) -> Any:
    """Size of a dimension, an int or a SymPy expression."""
    size: Any = 1
    for factor in d:
        size = size * factor.size
    return size


def regroup(layout: Layout, sizes: tuple[Any, ...]) -> Layout | None:
    """The layout after ``view(sizes)``, or None when the view splits the sequence.

    Row-major order alone decides which factors make up which new dimension, so a sequence as long as a head is wide is
    never mistaken for it.
    """
    pending = _merge_others([factor for d in layout for factor in d])
    result: list[Dim] = []
    for size in sizes:
        wanted, taken = expression(size), []
        while wanted != 1:
            if not pending:
                return None
            factor = pending.pop(0)
            rest = _quotient(wanted, factor.size)
            if rest is not None:
                taken.append(factor)
                wanted = rest
                continue
            rest = _quotient(factor.size, wanted)
            if rest is None or factor.role != "other":
                return None
            taken.append(Factor(wanted))
            pending.insert(0, Factor(rest))
            wanted = 1
        result.append(tuple(taken))
    return None if pending else tuple(result)


def _merge_others(factors: list[Factor]) -> list[Factor]:
    """Neighbouring factors that count nothing of interest as one, so that a view may cut them anywhere."""
    merged: list[Factor] = []
    for factor in factors:
        if merged and factor.role == merged[-1].role == "other":
            merged[-1] = Factor(merged[-1].size * factor.size)
        else:
            merged.append(factor)
    return merged


def _quotient(a: Any, b: Any) -> Any | None:
    """``a / b`` when that is a whole number for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = sympy.fraction(ratio)
    if denominator != 1 or not numerator.is_integer:
        return None
    return int(ratio) if ratio.is_Integer else ratio
