"""Which candidate runs a spec at which length: what a compiled graph carries from the choice to the call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from .candidates import Candidate
from .spec import AttentionSpec


@dataclass(frozen=True)
class Plan:
    """A spec and its picks: (largest number of stored tokens, candidate), ascending, the last one without a limit.

    The switch points are data of one compilation, so two compilations in a process never share a choice.
    """

    spec: AttentionSpec
    picks: tuple[tuple[int | None, Candidate], ...]

    def pick(self, tokens: int) -> Candidate:
        """The candidate for ``tokens`` stored tokens."""
        return next(candidate for limit, candidate in self.picks if limit is None or tokens <= limit)

    def key(self) -> str:
        """Canonical JSON: the string that custom ops carry."""
        picks = [[limit, candidate.key()] for limit, candidate in self.picks]
        return json.dumps({"picks": picks, "spec": self.spec.key()}, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> Plan:
        """The plan whose ``key()`` is ``key``."""
        return _plan(key)


@lru_cache(maxsize=4096)
def _plan(key: str) -> Plan:
    fields = json.loads(key)
    picks = tuple((limit, Candidate.from_key(name)) for limit, name in fields["picks"])
    return Plan(AttentionSpec.from_key(fields["spec"]), picks)
