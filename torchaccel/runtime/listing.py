"""What the lists are like that decode steps read by, and those that need nothing but attention to be made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


class Listing:
    """What the lists are like that decode steps read by. Subclasses are frozen dataclasses of numbers.

    unit, block: what an entry of a list stands for, a block of so many slots or a token. covers: stored tokens up to
    which a list names everything, so that none is made. listed, share: tokens that are read at most, and the part
    of the stored bytes that is read besides; the cost model goes by their sum.
    """

    unit: ClassVar[Literal["blocks", "tokens"]] = "blocks"
    block: int = 64
    covers: int = 0
    listed: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class MostAttended(Listing):
    """The ``tokens`` that received most attention in a layer that reads everything, its newest token among them.

    Such a layer remembers nothing: what it attended to in a step is what other layers read in the same step.
    """

    tokens: int
    unit: ClassVar[Literal["blocks", "tokens"]] = "tokens"

    @property
    def covers(self) -> int:  # type: ignore[override]
        return self.tokens

    @property
    def listed(self) -> int:  # type: ignore[override]
        return self.tokens
