"""What the lists are like that decode steps read by, and those that need nothing but attention to be made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


class Listing:
    """What the lists are like that decode steps read by. Subclasses are frozen dataclasses of numbers.

    unit, block: what an entry of a list stands for, a block of so many slots or a token. The cost model goes by the sum
    of ``listed`` and ``share``.
    """

    unit: ClassVar[Literal["blocks", "tokens"]] = "blocks"
    block: int = 64

    @property
    def covers(self) -> int:
        """Stored tokens up to which a list names everything, so that none is made."""
        return 0

    @property
    def listed(self) -> int:
        """Tokens that are read at most, whatever is stored."""
        return 0

    @property
    def share(self) -> float:
        """The part of the stored bytes that is read besides."""
        return 0.0


@dataclass(frozen=True)
class MostAttended(Listing):
    """The ``tokens`` that received most attention in a layer that reads everything, its newest token among them.

    Such a layer remembers nothing: what it attended to in a step is what other layers read in the same step.
    """

    tokens: int
    unit: ClassVar[Literal["blocks", "tokens"]] = "tokens"

    @property
    def covers(self) -> int:
        return self.tokens

    @property
    def listed(self) -> int:
        return self.tokens
