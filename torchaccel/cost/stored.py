"""How methods store the tokens of a layer: in which formats, and how many of them.

A method here is canonical options, {"method": name, every parameter}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.latents import rank_of
from ..kernels.spec import KVFormat

Method = Mapping[str, Any]
Formats = tuple[KVFormat, KVFormat]
BLOCK = 64


@dataclass(frozen=True)
class Part:
    """Tokens of a layer's cache that are stored alike, and read by one attention of a decode step.

    tokens: of each KV head on average. formats: of their keys and values. columns: bytes with which a token's place in
    the sequence is stored, for each head.
    """

    tokens: float
    formats: Formats
    columns: int = 0

    @property
    def token_bytes(self) -> float:
        """Bytes of a token of one head in a long cache."""
        return sum(fmt.token_bytes for fmt in self.formats) + self.columns

    @property
    def nbytes(self) -> float:
        """Bytes of one head: the newest tokens of formats with blocks wait in full precision."""
        found = self.columns * self.tokens
        for fmt in self.formats:
            waiting = min(self.tokens, fmt.window + fmt.block / 2) if fmt.is_blocked else 0.0
            found += waiting * fmt.tail_bytes / fmt.tail_tokens + (self.tokens - waiting) * fmt.token_bytes
        return found


def dense(dtype: str, head_dim: int) -> Formats:
    """Keys and values as the model makes them."""
    return KVFormat("dense", dtype, head_dim), KVFormat("dense", dtype, head_dim)


def formats(method: Method, dtype: str, head_dim: int) -> Formats:
    """How a method of ``FORMATS`` stores keys and values."""
    return FORMATS[method["method"]](method, dtype, head_dim)


def classes(method: Method, tokens: int, dtype: str, head_dim: int) -> tuple[Part, ...]:
    """The parts of a cache whose tokens are sorted into classes (ZipCache): few bits, more bits, and yet unsorted."""
    waiting = min(float(tokens), method["interval"] / 2)
    few = method["ratio"] * (tokens - waiting)
    parts = (
        Part(few, _class(method["low_bits"], dtype, head_dim), 4),
        Part(tokens - waiting - few, _class(method["high_bits"], dtype, head_dim), 4),
        Part(waiting, dense(dtype, head_dim)),
    )
    return tuple(part for part in parts if part.tokens > 0)


def of_heads(method: Method, tokens: int, heads: int) -> float:
    """Tokens of a head on average, where some of the model's ``heads`` keep sinks and a window (DuoAttention)."""
    chosen = method["retrieval_heads"]
    whole = 1 - method["sparsity"] if chosen is None else sum(map(len, chosen.values())) / heads
    return whole * tokens + (1 - whole) * min(tokens, method["sinks"] + method["recent"])


def _codes(method: Method, dtype: str, head_dim: int) -> Formats:
    """KIVI's layout, with GEAR's corrections where there are any."""
    name, group, window = method["method"], method.get("group", 0), method.get("window", 0)
    kind: Any = f"int{method['bits']}" if "bits" in method else name
    more = {name: method[name] for name in ("rank", "outliers") if name in method}
    block, channels = max(BLOCK, group), group if group and head_dim % group == 0 else 0
    keys = KVFormat(kind, dtype, head_dim, "channel", block, group, window, "channel", **more)
    return keys, KVFormat(kind, dtype, head_dim, "token", block, channels, window, "token", **more)


def _class(bits: int, dtype: str, head_dim: int) -> Formats:
    return dense(dtype, head_dim) if bits == 16 else _codes({"method": f"int{bits}"}, dtype, head_dim)


def _codebook(method: Method, dtype: str, head_dim: int) -> Formats:
    keys, values = (_codes({"method": f"int{method[bits]}"}, dtype, head_dim) for bits in ("key_bits", "value_bits"))
    return _turned(keys[0], method), _turned(values[1], method)


def _turned(fmt: KVFormat, method: Method) -> KVFormat:
    return KVFormat(
        fmt.kind, fmt.dtype, fmt.head_dim, "token", BLOCK, 0, method["window"], fmt.packing, codebook="gaussian"
    )


def _latents(method: Method, dtype: str, head_dim: int) -> Formats:
    def of(density: float) -> KVFormat:
        if density == 1:
            return KVFormat("dense", dtype, head_dim)
        rank = rank_of(density, head_dim)
        return KVFormat("latent", dtype, head_dim, block=method["window"], window=1, rank=rank)

    return of(method["key_density"]), of(method["value_density"])


FORMATS: dict[str, Callable[[Method, str, int], Formats]] = {
    "int8": _codes,
    "int4": _codes,
    "int2": _codes,
    "gear": _codes,
    "turboquant": _codebook,
    "cskv": _latents,
}
