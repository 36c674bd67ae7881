"""Bytes of all the tensors inside an object, whatever library made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def tensor_bytes(value: Any) -> int:
    """Bytes allocated for the tensors reachable from ``value`` through attributes, lists, tuples and mappings.

    Wrapper subclasses (packed or quantised tensors) count with the tensors they are made of, storage that several
    tensors share counts once. Modules and the weights in them are not entered.
    """
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    # Objects are kept alive while their identity is remembered.
    pending = alive = [value]
    while pending:
        found: list[Any] = []
        for item in pending:
            if id(item) in seen or isinstance(item, (nn.Module, type, str, bytes)):
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                found += _inner(item, sizes)
            elif isinstance(item, Mapping):
                found += item.values()
            elif isinstance(item, (list, tuple, set)):
                found += item
            else:
                found += getattr(item, "__dict__", {}).values()
        alive = alive + found
        pending = found
    return sum(sizes.values())


def _inner(tensor: Tensor, sizes: dict[int, int]) -> list[Tensor]:
    """The tensors a wrapper subclass is made of; of a plain tensor none, but its storage is entered in ``sizes``."""
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    storage = tensor.untyped_storage()
    sizes[storage.data_ptr()] = storage.nbytes()
    return []
