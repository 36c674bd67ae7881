"""The polynomial through the table of a Gaussian codebook: what a GPU computes where a CPU looks a code up."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from ..codebook import gaussian


@lru_cache(maxsize=8)
def table_polynomial(bits: int) -> tuple[float, ...]:
    """Coefficients of x, x**3, x**5, ... whose sum at ``x = 2 * code + 1 - 2**bits`` is ``gaussian(bits)[code]``.

    The table is odd, so half as many coefficients as it has numbers go through all of them: 8 fused multiplications and
    additions for 4 bits. A tree of selects takes 7 selects and as many steps to prepare them, a table in memory a load
    for every element, for which Triton reserves shared memory. In float32 the relative error is below 3e-7, fused or
    not. Solved in fractions and rounded to 9 digits, which say all of a float32: the same text on every machine.
    """
    numbers = gaussian(bits)[2 ** (bits - 1) :]
    size = len(numbers)
    rows = [
        [Fraction(2 * i + 1) ** (2 * power + 1) for power in range(size)] + [Fraction(number)]
        for i, number in enumerate(numbers)
    ]
    for i, pivot in enumerate(rows):
        pivot[:] = [x / pivot[i] for x in pivot]
        for row in rows:
            if row is not pivot:
                row[:] = [x - row[i] * y for x, y in zip(row, pivot, strict=True)]
    return tuple(float(f"{float(row[-1]):.9g}") for row in rows)
