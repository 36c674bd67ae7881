"""The frozen descriptions from which every kernel is generated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which specs know ``dtype`` ("float32", "bfloat16" or "float16")."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"kernels know the dtypes {', '.join(DTYPES)}; found {dtype}")


@dataclass(frozen=True)
class KVFormat:
    """How the keys, or the values, of one layer lie in memory.

    kind "dense": one tensor ``[B, H, C, D]`` in ``dtype``, C slots of capacity.
    kind "int8": one uint8 tensor ``[B, H, row_bytes]``; a row is a tail of ``block`` tokens in ``dtype`` followed by
    blocks of ``block * D`` codes, then n scales and n minima in float16, with n = D for axis "channel" (keys) and
    n = ``block`` for axis "token" (values). Slots before ``filled - filled % block`` live in blocks, the rest in the
    tail: a token is read in full precision until its block is complete. ``x = code * scale + minimum``.
    kind "empty": no storage at all, for layers that are never read again.
    """

    kind: Literal["dense", "int8", "empty"]
    dtype: str
    head_dim: int
    axis: Literal["token", "channel"] = "token"
    block: int = 64

    @property
    def tail_bytes(self) -> int:
        """Bytes of the full-precision tail at the start of an int8 row."""
        return self.block * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def groups(self) -> int:
        """Number of (scale, minimum) pairs in one int8 block."""
        return self.head_dim if self.axis == "channel" else self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of one int8 block: codes, scales, minima."""
        return self.block * self.head_dim + 4 * self.groups


@dataclass(frozen=True)
class AttentionSpec:
    """One attention kernel: what it reads, which scores it modifies, which keys it may see.

    ``phase`` "decode" is the fused append-and-attend over a cache (any number of new tokens); "prefill" attends over
    fresh keys and values ``[B, H_kv, S, D]`` without a cache.
    ``group`` is the number of query heads per KV head (GQA). ``mask`` tells how a mask argument is read: "bool" (True =
    attend) or "additive" (added to the scaled scores). A key in logical column c is seen by the query in column t iff
    the mask allows it, ``c <= t`` when ``causal``, and, when ``window`` is set, ``c > t - window`` or c is one of the
    first ``sinks`` unmasked columns of the batch row. ``positions`` says that a slot's column is stored, not implied.
    """

    phase: Literal["decode", "prefill"]
    head_dim: int
    group: int
    dtype: str
    key_format: KVFormat
    value_format: KVFormat
    scale: float
    causal: bool = True
    softcap: float | None = None
    mask: Literal["none", "bool", "additive"] = "none"
    window: int | None = None
    sinks: int = 0
    positions: bool = False

    def key(self) -> str:
        """Canonical JSON of the spec: the string that custom ops carry and caches are keyed by."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> AttentionSpec:
        """The spec whose ``key()`` is ``key``."""
        return _attention_spec(key)

    def dense(self) -> AttentionSpec:
        """The same attention over every visible key."""
        return replace(self, window=None, sinks=0)


@lru_cache(maxsize=4096)
def _attention_spec(key: str) -> AttentionSpec:
    fields: dict[str, Any] = json.loads(key)
    for name in ("key_format", "value_format"):
        fields[name] = KVFormat(**fields[name])
    return AttentionSpec(**fields)


@dataclass(frozen=True)
class LinearSpec:
    """``y = x @ W.T + b`` for a few rows of x, read at memory bandwidth.

    ``dtype`` is that of x, W, b and y; sums are float32. ``rows`` is the largest number of rows of x (decode batch).
    """

    dtype: str
    rows: int
    bias: bool
