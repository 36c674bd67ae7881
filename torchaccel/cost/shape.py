"""The sizes of one call of a kernel, beyond what its spec says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention call.

    batch: rows. kv_heads: KV heads. queries: new tokens (decode) or the prompt's (prefill). tokens: keys that are
    stored when attention runs. density: share of the keys, or of the (query, key) pairs, that is read; None takes it
    from the spec's mask and window, and reads everything where a list of blocks or tokens decides. listed: keys that
    are read besides ``density``, however many are stored. sites: how many calls like this one stand between two reads
    of the same bytes (the layers of a model): together they decide whether the cache holds them.
    """

    batch: int
    kv_heads: int
    queries: int
    tokens: int
    density: float | None = None
    sites: int = 1
    listed: int = 0

    def at(self, tokens: int) -> AttentionShape:
        """The same call with ``tokens`` stored."""
        return replace(self, tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class LinearShape:
    """Sizes of linear layers that share their input: rows of x, its width, widths of the results; sites as above.

    density: share of the weights that is read, by neurons or by inputs. An MLP over neurons counts as three layers.
    """

    rows: int
    inputs: int
    outputs: tuple[int, ...]
    sites: int = 1
    density: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON values."""
        return asdict(self) | {"outputs": list(self.outputs)}


Shape = AttentionShape | LinearShape
