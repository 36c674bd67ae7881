"""Which candidate runs a spec: what the operator of a kernel carries whose choice does not depend on a length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from .candidates import Candidate, Spec, spec_from_key


@dataclass(frozen=True)
class Pick:
    """A spec, and the candidate that was measured to be its fastest; None for the seed, where nothing was measured."""

    spec: Spec
    candidate: Candidate | None = None

    def key(self) -> str:
        """The string that custom ops carry: the spec's own key for the seed, else JSON of both."""
        if self.candidate is None:
            return self.spec.key()
        fields = {"pick": self.candidate.key(), "spec": self.spec.key()}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(kernel: str, key: str) -> Pick:
        """The pick of a kernel ("linear", "fused", "select") whose ``key()`` is ``key``."""
        return _pick(kernel, key)


@lru_cache(maxsize=4096)
def _pick(kernel: str, key: str) -> Pick:
    fields = json.loads(key)
    if "pick" not in fields:
        return Pick(spec_from_key(kernel, key))
    return Pick(spec_from_key(kernel, fields["spec"]), Candidate.from_key(fields["pick"]))
