"""The frozen description of gathering the same tokens of several tensors at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache


@dataclass(frozen=True)
class TokenItem:
    """A tensor of which tokens are taken along dimension ``dim``; also along the next one, the last, where ``square``.

    ``square`` is for masks ``[B, H, N, N]``. width: bytes of an element, whatever its dtype.
    """

    dim: int
    width: int
    square: bool = False


@dataclass(frozen=True)
class GatherSpec:
    """Tokens ``index`` int64 ``[B, K]`` of every item: ``out[b, .., k, ..] = x[b, .., index[b, k], ..]``.

    Items have as many tokens each, which negative numbers count from the end. With B above 1 the first dimension of an
    item is the batch, of B rows or of one for all of them; else every row of its leading dimensions gets the same
    tokens. Results are contiguous, and have the bits of their items.
    """

    items: tuple[TokenItem, ...]

    def key(self) -> str:
        """Canonical JSON of the spec: the string that the custom op carries."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_key(key: str) -> GatherSpec:
        """The spec whose ``key()`` is ``key``."""
        return GatherSpec(tuple(TokenItem(**item) for item in json.loads(key)["items"]))

    def shape(self, item: TokenItem, x: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is gathered of an item of shape ``x`` by an index of shape ``index``."""
        sizes = list(x)
        if item.dim:
            sizes[0] = index[0] if isinstance(x[0], int) and x[0] == 1 else x[0]
        for dim in range(item.dim, item.dim + 1 + item.square):
            sizes[dim] = index[1]
        return tuple(sizes)
