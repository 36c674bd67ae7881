"""With what latents are made of the tokens of a layer, and tokens of latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The factors of one layer's keys, or values; equal digests are equal factors.

    basis: ``[H_kv * rank, H_kv * D]``, the latents of a token from the tokens of all its heads side by side (of keys,
    before rotary embedding). projection: ``[H_kv, H_kv * rank, D]``, back again, for each head. rotary: channels of a
    key that are turned by its position, 0 where none are. digest: of the plan they are from, and their place in it.
    """

    digest: str
    rotary: int
    basis: Tensor = field(compare=False, repr=False)
    projection: Tensor = field(compare=False, repr=False)

    # Dynamo copies what describes a tensor to compare it later.
    def __deepcopy__(self, memo: Any) -> Factors:
        return self

    def to(self, device: Any) -> Factors:
        """The same on another device."""
        return Factors(self.digest, self.rotary, self.basis.to(device), self.projection.to(device))


def factors(digest: str, rotary: int, basis: Tensor, kv_heads: int) -> Factors:
    """The factors of an orthonormal basis: what is nearest to a token among what its latents can tell."""
    projection = basis.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()
    return Factors(digest, rotary, basis.contiguous(), projection)
