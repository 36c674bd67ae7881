"""Rotations that make the coordinates of any token nearly normal, so that one codebook fits them all (TurboQuant)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .spec import KVFormat


@lru_cache(maxsize=64)
def rotation(head_dim: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix float32 ``[D, D]`` on the CPU, the same for equal arguments; ``y = matrix @ x``.

    A Hadamard matrix after random signs where D is a power of two, else the Q of a random matrix, whose columns are
    signed so that it does not depend on the library (Mezzadri, arXiv math-ph/0609050). Tokens and queries turned alike
    have the same dot products; TurboQuant is arXiv 2504.19874.
    """
    generator = torch.Generator().manual_seed(seed)
    if head_dim & (head_dim - 1):
        random = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(random)
        return (q * r.diagonal().sign()).float()
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (head_dim,), generator=generator) * 2.0 - 1.0
    return matrix * signs / math.sqrt(head_dim)


@lru_cache(maxsize=64)
def _on(device: torch.device, head_dim: int) -> Tensor:
    # Every layer of every step asks for it.
    return rotation(head_dim).to(device)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Every token of x ``[..., D]`` turned by ``matrix`` ``[D, D]``: computed in float32, in x's dtype."""
    return (x.float() @ matrix.mT).to(x.dtype)


def stored(fmt: KVFormat, tokens: Tensor) -> Tensor:
    """Tokens ``[..., D]`` as a cache of ``fmt`` holds them: turned, where its codebook is for turned ones."""
    return rotate(tokens, _on(tokens.device, fmt.head_dim)) if fmt.codebook == "gaussian" else tokens


def restored(fmt: KVFormat, tokens: Tensor) -> Tensor:
    """What ``stored`` made of ``tokens`` turned back."""
    return rotate(tokens, _on(tokens.device, fmt.head_dim).mT) if fmt.codebook == "gaussian" else tokens


def rotated(attend: Callable[..., Any], keys: KVFormat, values: KVFormat) -> Callable[..., Any]:
    """Decode attention over a cache of rotated tokens, with the arguments and results of ``attend`` over plain ones.

    attend: any implementation of ``reference.decode_attention``, without its spec. keys, values: the formats, which say
    what is rotated. q and k_new are turned with the keys, v_new with the values, and the result back: attention is
    linear in the values, so nothing that is read from the cache needs to be turned.
    """

    def run(q: Tensor, k_new: Tensor | None, v_new: Tensor | None, *rest: Any) -> Any:
        k_new = None if k_new is None else stored(keys, k_new)
        v_new = None if v_new is None else stored(values, v_new)
        got = attend(stored(keys, q), k_new, v_new, *rest)
        out, *sides = got if isinstance(got, tuple) else (got,)
        out = restored(values, out)
        return (out, *sides) if sides else out

    return run
