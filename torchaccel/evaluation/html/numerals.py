"""Numbers for the eye."""

from __future__ import annotations

ABSENT = "–"


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, thousands grouped; a dash for None."""
    if value is None:
        return ABSENT
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if value and abs(value) >= 1e-3 else f"{value:.{digits - 1}g}"


def fixed(value: float | None, digits: int) -> str:
    """``digits`` decimals; a dash for None."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as a percentage; a dash for None."""
    return ABSENT if value is None else f"{value:.{digits}%}".replace("%", " %")


def megabytes(value: float | None) -> str:
    """Bytes as 10^6 bytes; a dash for None."""
    return ABSENT if value is None else significant(value / 1e6)
