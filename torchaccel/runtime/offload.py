"""Buffers of caches that lie in a file, mapped into memory, or in host memory, away from their device."""

from __future__ import annotations

import mmap
import tempfile

import torch
from torch import Tensor

from torchaccel.errors import OffloadError
from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat


def allocate(fmt: KVFormat, rows: int, heads: int, capacity: int, folder: str) -> tuple[Tensor, mmap.mmap]:
    """A buffer as of ``kv_format.allocate`` in a file of ``folder``, and its mapping: see ``mapped``."""
    return mapped(kv_format.allocate(fmt, rows, heads, capacity, torch.device("meta")), folder)


def mapped(sizes: Tensor, folder: str) -> tuple[Tensor, mmap.mmap]:
    """A tensor of the shape and dtype of ``sizes`` in a file of ``folder``, and its mapping.

    The file has no name: it is gone with the tensor. Raises ``OffloadError`` where it cannot be made.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(sizes.nbytes)
            mapping = mmap.mmap(file.fileno(), sizes.nbytes)
    except OSError as error:
        raise OffloadError(
            f"asked to keep {sizes.nbytes / 1e6:.0f} MB of a KV cache in a file of {folder!r}: {error.strerror}; name "
            "a folder with room in the option offload, or leave it out"
        ) from error
    return torch.frombuffer(mapping, dtype=sizes.dtype).view(sizes.shape), mapping


def host(fmt: KVFormat, rows: int, heads: int, capacity: int, device: torch.device) -> Tensor:
    """A buffer as of ``kv_format.allocate`` in host memory, pinned for a GPU, so that it is read at the full rate."""
    sizes = kv_format.allocate(fmt, rows, heads, capacity, torch.device("meta"))
    return torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=device.type == "cuda")


def release(mapping: mmap.mmap) -> None:
    """Give up the memory behind a mapping; what is read next comes from the file, or the system's cache of it."""
    mapping.madvise(mmap.MADV_DONTNEED)
