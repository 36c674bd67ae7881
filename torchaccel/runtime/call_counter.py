"""What is known of the calls of a compiled graph: how many, how long, and the bytes of KV cache that they left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .kv import LogicalKV


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of the keys and values of one layer: in memory, and what plain tensors of all tokens would take."""

    stored: int
    plain: int


class CallCounter:
    """How often a compiled graph ran, for how long, and the bytes of KV cache it held after the last call.

    kv_bytes, file_bytes: those in memory, and those in files. host_bytes: set aside in host memory; part of the KV
    bytes where the caches are there, too, and else beside them. layers: by layer, in the order of the model; what
    layers share is counted in each. unshared: why rows that begin alike came with, or were given, copies of what they
    could have shared. shares: what part of the pairs (a prompt's causal ones) each sparse site without a cache read in
    the last call, scalars on the model's device.
    """

    def __init__(self) -> None:
        self.unshared: set[str] = set()
        self.calls = 0
        self.seconds = 0.0
        self.kv_bytes = 0
        self.host_bytes = 0
        self.file_bytes = 0
        self.layers: list[LayerBytes] = []
        self.shares: list[Tensor] = []

    def note(self, caches: Iterable[tuple[Any, Any]]) -> None:
        """Count the bytes behind the keys and values of every layer."""
        parts: dict[Any, int] = {}
        self.layers = []
        for pair in caches:
            stored = plain = 0
            for kv in pair:
                if isinstance(kv, LogicalKV) and kv.physical is not None:
                    own = {part: part.nbytes for part in kv.physical.parts}
                    parts |= own
                    stored += sum(own.values())
                    plain += kv.numel() * kv.itemsize
            self.layers.append(LayerBytes(stored, plain))
        self.kv_bytes = sum(parts.values())
        self.host_bytes = sum(part.host_bytes for part in parts)
        self.file_bytes = sum(part.file_bytes for part in parts)
