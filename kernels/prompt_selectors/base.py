"""What a policy for sparse attention without a cache offers: lists of blocks, and what lists and choice cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor

from ..spec import AttentionSpec

# Of the causal pairs, where nobody says more: on the side of dense attention.
EXPECTED = 1 / 3


@dataclass(frozen=True)
class BlockSelector:
    """Chooses, for blocks of ``block`` queries of every head, the blocks of as many keys that they read.

    Selectors are data: frozen, comparable, and what a compiled graph carries of them is ``key()``. causal: whether the
    queries see no later keys, so that the pairs of which there is a share are the causal ones; else they are all.
    """

    causal: ClassVar[bool]

    block: int

    def share(self, tokens: int) -> float:
        """The part of the pairs of ``tokens`` tokens that the lists are expected to hold.

        It is 1 where they hold everything; such tokens are not chosen from.
        """
        raise NotImplementedError

    def effort(self, tokens: int) -> float:
        """What the choice costs, in attention to everything."""
        raise NotImplementedError

    def key(self) -> str:
        """Canonical JSON of the selector."""
        return json.dumps({"kind": type(self).__name__, **asdict(self)}, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class PromptSelector(BlockSelector):
    """Chooses for prompts: causal attention of tokens in their order."""

    causal = True

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        """The lists: int32 ``[B, H, ceil(S / block), N]``, ascending and without repeats, then -1.

        spec: of the attention that reads them. q: ``[B, H, S, D]``. k: ``[B, H_kv, S, D]``. first: int64 ``[B]``, first
        live token of every row (left padding); None for zeros. A block that holds live queries always lists itself and
        never a later one; a block wholly in the padding lists nothing.
        """
        raise NotImplementedError


def banded_share(tokens: int, seen: int) -> float:
    """The part of the causal pairs of ``tokens`` queries that each read at most ``seen`` keys."""
    seen = min(seen, tokens)
    return (seen * (seen + 1) / 2 + (tokens - seen) * seen) / max(tokens * (tokens + 1) / 2, 1)


def expected_share(tokens: int, mass: float, least: int, expected: float) -> float:
    """The part that blocks which hold ``mass`` of the attention are expected to be; all, up to ``least`` tokens.

    How many they are is the prompt's business: ``expected`` is what the caller says of it.
    """
    return 1.0 if mass >= 1 or tokens <= least else expected
