"""The frozen descriptions from which every kernel is generated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import prod
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


BITS = {"int8": 8, "int4": 4, "int2": 2}
# Fields that specs have not always had: a key names them only where they say something, so keys on disk stay valid.
LATER_FIELDS: dict[str, Any] = {"rank": 0, "outliers": 0, "codebook": "uniform", "rotary": "none", "rotary_dim": 0}


@dataclass(frozen=True)
class Part:
    """Something that a block of codes stores for each (batch, KV head): its name, dtype and sizes."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in a block."""
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class KVFormat:
    """How the keys, or the values, of one layer lie in memory.

    kind "dense": one tensor ``[B, H, C, D]`` in ``dtype``, C slots of capacity.
    kind "int8", "int4", "int2": one uint8 tensor ``[B, H, row_bytes]``; a row is a tail of ``window + block`` tokens in
    ``dtype``, then blocks of ``block`` tokens: codes, float16 scales, float16 minima, ``x = code * scale + minimum``.
    The newest ``window`` tokens at least, and whatever does not fill a block yet, are read from the tail in full
    precision; ``quantised(filled)`` slots lie in blocks.
    kind "latent": keys, or values, of which, once they leave the tail, only ``rank`` numbers a head remain (CSKV, arXiv
    2409.10593), of keys from before the rotary embedding; those of all heads together give every head's key, or value,
    see latents.py. The layout is as for codes; a token is ``[D + rank]`` wide in the tail, exact and latents, and
    ``[rank]`` in blocks.
    kind "empty": no storage at all, for layers that are never read again.

    axis: "channel", a scale for each channel of ``group`` tokens (KIVI keys), or "token", one for each token of
    ``group`` channels; group 0 is the whole block, or the whole token. Scales lie ``[block / group, D]`` for "channel",
    ``[D / group, block]`` for "token".
    packing: the dimension in which four codes lie side by side, that which attention sums over: "channel" for keys,
    "token" for values. Codes are uint8 ``[Q / n, M, 4]`` with Q quads of that dimension (padded to whole bytes), M the
    size of the other one, and ``n = 8 / bits`` quads in the bits of each byte, the first one lowest. A dot product with
    integers takes four neighbours at once, and a vector of sums is one of neighbouring tokens, or channels.

    rank, outliers: what GEAR (arXiv 2403.05527) adds to codes; 0 for neither. Of every group ``outliers`` values, half
    of them its largest and half its smallest, count as the group's mean when it is quantised; the error elsewhere is
    approximated by ``A @ B.T`` of this rank, and what is then left of the outliers is stored by itself. The value read
    is ``code * scale + minimum + (A @ B.T) + outlier``. Unlike in the paper, where a prompt is one block, every block
    stands for itself, as appending and truncating need it, and outliers are those of a group (of the whole channel, or
    token, where group is 0), as it is the group's range that they would stretch.
    codebook: "uniform", or "gaussian": codes are places in the best table for normally distributed numbers, ``x =
    table[code] * scale``, without minima (TurboQuant, arXiv 2504.19874). It is for tokens that were rotated (see
    rotation.py), with int4 or int2 and a scale for each token.

    Raises ``ValueError`` for fields that contradict each other.
    """

    kind: Literal["dense", "int8", "int4", "int2", "latent", "empty"]
    dtype: str
    head_dim: int
    axis: Literal["token", "channel"] = "token"
    block: int = 64
    group: int = 0
    window: int = 0
    packing: Literal["channel", "token"] = "channel"
    rank: int = 0
    outliers: int = 0
    codebook: Literal["uniform", "gaussian"] = "uniform"

    def __post_init__(self) -> None:
        if self.codebook == "gaussian":
            if self.kind not in ("int4", "int2") or self.axis != "token" or self.is_corrected:
                raise ValueError(
                    "codebook 'gaussian' is for kind 'int4' or 'int2', axis 'token', without rank and outliers; "
                    f"found {self}"
                )
        elif (self.rank or self.outliers) and not self.is_blocked:
            raise ValueError(f"rank and outliers correct codes, which kind {self.kind!r} has not; found {self}")
        if self.kind == "latent" and (self.rank < 1 or self.outliers):
            raise ValueError(f"kind 'latent' stores rank numbers, at least 1, and no outliers; found {self}")
        if self.rank < 0 or self.outliers < 0 or self.outliers % 2:
            raise ValueError(f"rank is at least 0, outliers are an even number; found {self}")
        if self.outliers > self.group_size or (self.outliers and self.group_size > 256):
            raise ValueError(f"outliers are at most as many as a group has values, and that at most 256; found {self}")

    @property
    def is_quantised(self) -> bool:
        """Whether tokens lie in blocks of codes."""
        return self.kind in BITS

    @property
    def is_blocked(self) -> bool:
        """Whether tokens leave a full-precision tail for blocks that store them in another way."""
        return self.is_quantised or self.kind == "latent"

    @property
    def width(self) -> int:
        """Numbers of a token in full precision."""
        return self.head_dim + (self.rank if self.kind == "latent" else 0)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.kind]

    @property
    def tail_tokens(self) -> int:
        """Tokens that fit the full-precision tail."""
        return self.window + self.block

    @property
    def tail_bytes(self) -> int:
        """Bytes of the full-precision tail at the start of a row."""
        return self.tail_tokens * self.width * DTYPES[self.dtype].itemsize

    @property
    def group_size(self) -> int:
        """Tokens (axis "channel") or channels (axis "token") that share a scale."""
        return self.group or (self.block if self.axis == "channel" else self.head_dim)

    @property
    def groups(self) -> int:
        """Number of (scale, minimum) pairs in one block."""
        if self.axis == "channel":
            return self.block // self.group_size * self.head_dim
        return self.head_dim // self.group_size * self.block

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one block."""
        packed, other = (self.head_dim, self.block) if self.packing == "channel" else (self.block, self.head_dim)
        return -(-packed // (4 * (8 // self.bits))) * other * 4

    @property
    def is_corrected(self) -> bool:
        """Whether blocks store what quantisation lost."""
        return self.is_quantised and (self.rank > 0 or self.outliers > 0)

    @property
    def corrections(self) -> float:
        """Numbers that correct codes, for each token and channel."""
        if not self.is_corrected:
            return 0.0
        return self.rank * (1 / self.block + 1 / self.head_dim) + self.outliers / self.group_size

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a block stores, in the order in which it lies there."""
        if self.kind == "latent":
            return (Part("latents", DTYPES[self.dtype], (self.block, self.rank)),)
        half, byte, groups = torch.float16, torch.uint8, self.groups
        found = [Part("codes", byte, (self.code_bytes,)), Part("scales", half, (groups,))]
        if self.codebook == "uniform":
            found.append(Part("minima", half, (groups,)))
        if self.rank:
            found.append(Part("token_factors", half, (self.rank, self.block)))
            found.append(Part("channel_factors", half, (self.rank, self.head_dim)))
        if self.outliers:
            found.append(Part("outliers", half, (self.outliers, groups)))
            found.append(Part("places", byte, (self.outliers, groups)))
        return tuple(found)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, rounded up to whole words of 4."""
        return -(-sum(part.nbytes for part in self.parts) // 4) * 4

    @property
    def token_bytes(self) -> float:
        """Bytes of one token of one head in a long cache."""
        if self.kind == "empty":
            return 0.0
        if self.kind == "dense":
            return float(self.head_dim * DTYPES[self.dtype].itemsize)
        return self.block_bytes / self.block

    def quantised(self, filled: int) -> int:
        """How many of ``filled`` slots lie in blocks; the rest is in the tail."""
        return max(0, filled - self.window) // self.block * self.block


@dataclass(frozen=True)
class AttentionSpec:
    """One attention kernel: what it reads, which scores it modifies, which keys it may see.

    ``phase`` "decode" is the fused append-and-attend over a cache (any number of new tokens); "prefill" attends over
    fresh keys and values ``[B, H_kv, S, D]`` without a cache.
    ``group`` is the number of query heads per KV head (GQA). ``mask`` tells how a mask argument is read: "bool" (True =
    attend) or "additive" (added to the scaled scores). A key in logical column c is seen by the query in column t iff
    the mask allows it, ``c <= t`` when ``causal``, and, when ``window`` is set, ``c > t - window`` or c is one of the
    first ``sinks`` unmasked columns of the batch row. ``positions`` says that a slot's column is stored, not implied.
    ``rotary``: q and the new keys come before rotary embedding, with its cos and sin, and are rotated first: the first
    ``rotary_dim`` channels of a head, in pairs (i, i + rotary_dim / 2) ("half") or (2 i, 2 i + 1) ("interleaved").
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
    head_windows: bool = False
    index: Literal["contiguous", "blocks", "tokens"] = "contiguous"
    index_block: int = 64
    lse: bool = False
    mass: bool = False
    rotary: Literal["none", "half", "interleaved"] = "none"
    rotary_dim: int = 0

    def key(self) -> str:
        """Canonical JSON of the spec: the string that custom ops carry and caches are keyed by."""
        return json.dumps(named(asdict(self)), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> AttentionSpec:
        """The spec whose ``key()`` is ``key``."""
        return _attention_spec(key)

    def dense(self) -> AttentionSpec:
        """The same attention over every visible key."""
        return replace(self, window=None, sinks=0)


def named(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec, or a format, as a key names them: without later ones that say nothing."""
    return {
        name: named(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in LATER_FIELDS or value != LATER_FIELDS[name]
    }


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

    def key(self) -> str:
        """Canonical JSON of the spec."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_key(key: str) -> LinearSpec:
        """The spec whose ``key()`` is ``key``."""
        return LinearSpec(**json.loads(key))
