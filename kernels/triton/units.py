"""Strides as the kernels take them: counted in rows, so that their divisibility needs no specialised variants."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from ..spec import KVFormat


def rows_in_units(x: Tensor, d: int) -> tuple[Tensor, int, int, int]:
    """``x`` ``[B, H, n, D]`` with its first three strides in units of D, copied only when they are not whole."""
    b, h, t, one = x.stride()
    if one != 1 or b % d or h % d or t % d:
        x = x.contiguous()
        b, h, t, _ = x.stride()
    return x, b // d, h // d, t // d


def on_device(first: Tensor | None, device: torch.device) -> Tensor | None:
    """First live slots, int64 ``[B]``, where the kernels can read them."""
    return None if first is None else first.to(device=device, dtype=torch.int64)


def stride_unit(fmt: KVFormat) -> int:
    """Elements of a cache buffer that its batch and head strides are whole multiples of, whatever its capacity."""
    return gcd(fmt.tail_bytes, fmt.block_bytes) if fmt.is_blocked else fmt.head_dim


def buffer_strides(fmt: KVFormat, buf: Tensor) -> list[int]:
    """Batch and head strides of a cache buffer in ``stride_unit``s.

    Raises ValueError when its slots do not lie side by side.
    """
    strides, unit = buf.stride(), stride_unit(fmt)
    if strides[-1] != 1 or strides[0] % unit or strides[1] % unit or (fmt.kind == "dense" and strides[2] != unit):
        raise ValueError(f"slots of a cache buffer must lie side by side, found strides {strides} for {fmt}")
    return [strides[0] // unit, strides[1] // unit]


def mask_strides(mask: Tensor) -> list[int]:
    """Strides of a mask ``[B | 1, H | 1, Q, columns]``, zero where it is broadcast over batch rows or heads."""
    b, h, q, c = mask.stride()
    return [b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, q, c]
