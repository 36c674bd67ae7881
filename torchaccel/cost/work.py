"""How much work each implementation of a kernel makes of a call: formulas, one function per implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import sympy
from sympy import Max, Min, ceiling, floor

from .symbols import (
    ATTENTION,
    LINEAR,
    B,
    D,
    H_kv,
    H_q,
    K,
    M,
    N,
    P,
    S_kv,
    S_q,
    bits,
    corrections,
    density,
    latents,
    matrices,
    outliers,
    tail,
    width,
)

# Keys that the C++ kernel handles at a time, and tiles below which it wakes no second thread.
CPP_TILE, CPP_MIN_TILES = 64, 8
# Query rows that share a read of K and V in one unit of the C++ kernel; queries of one block of the prefill kernel.
CPP_ROWS, CPP_BLOCK = 32, 48
# Operators of which stock attention consists: sdpa with its mask, one dequantisation, the reference.
COMPOSED_OPERATORS, DEQUANTISE_OPERATORS, REFERENCE_OPERATORS = 12, 16, 25
# Rows of queries that one task of stock attention takes.
SDPA_ROWS = 32
TRITON_ROWS = 16
# Latents that it multiplies at a time to make keys.
TRITON_LATENTS = 32


@dataclass(frozen=True)
class Work:
    """Work of one call, each part an expression in the symbols of ``cost.symbols``.

    size: bytes read and written. resident: bytes that a repeated call finds in a cache that holds them. flops: of
    matrix products. rows: (query head, key) pairs whose score goes through the softmax. codes: quantised numbers
    decoded, with the factors and outliers that correct them. load: share of the work on the busiest processor, 1 / P at
    best. pieces: partial results to merge. launches: kernels or operators started. forks: times that threads are woken
    and joined. in_flight: bytes that one processor has requested at a time, 0 where hardware prefetches. shared: bytes
    of fast memory of one block.
    """

    symbols: tuple[Any, ...]
    size: Any
    resident: Any
    flops: Any
    rows: Any
    codes: Any
    load: Any
    pieces: Any
    launches: Any
    forks: Any
    in_flight: Any
    shared: Any

    @property
    def utilisation(self) -> Any:
        """Mean over busiest processor: 1 where all have the same share."""
        return 1 / (P * self.load)


@lru_cache(maxsize=256)
def work(kernel: str, implementation: str, config: tuple[tuple[str, int | str], ...], quantised: bool) -> Work:
    """The work of an implementation of a kernel with the free choices ``config``.

    Raises ``ValueError`` for a kernel or an implementation that has no formulas.
    """
    makers = {
        ("decode_attention", "cpp"): _cpp_decode,
        ("decode_attention", "triton"): _triton_decode,
        ("decode_attention", "composed"): _composed_decode,
        ("decode_attention", "reference"): _reference_attention,
        ("prefill_attention", "cpp"): _cpp_prefill,
        ("prefill_attention", "triton"): _triton_prefill,
        ("prefill_attention", "composed"): _composed_prefill,
        ("prefill_attention", "reference"): _reference_attention,
        ("linear", "cpp"): _cpp_linear,
        ("linear", "reference"): _reference_linear,
        ("sparse_mlp", "cpp"): _cpp_sparse,
        ("sparse_mlp", "reference"): _reference_sparse,
        ("threshold_linear", "cpp"): _cpp_sparse,
        ("threshold_linear", "reference"): _reference_sparse,
    }
    maker = makers.get((kernel, implementation))
    if maker is None:
        known = ", ".join(f"{name} by {by}" for name, by in makers)
        raise ValueError(f"no formulas for {kernel} by {implementation}; there are those of {known}")
    return maker(dict(config), quantised)


# Work of nothing but one launch: what a formula leaves out.
_NOTHING = {field.name: sympy.Integer(0) for field in fields(Work)} | {"load": 1 / P, "launches": sympy.Integer(1)}


def _work(symbols: tuple[Any, ...], **parts: Any) -> Work:
    return Work(**_NOTHING | {"symbols": symbols} | {name: sympy.sympify(value) for name, value in parts.items()})


def _stored(share: Any) -> Any:
    """Bytes of ``share`` of the keys and values; the newest tokens of a quantised cache wait in full precision."""
    waiting = Min(S_kv, tail)
    return 2 * B * H_kv * D * share * (waiting * width + (S_kv - waiting) * bits / 8)


def _queries() -> Any:
    """Bytes of queries and results."""
    return 2 * B * H_q * S_q * D * width


def _codes(quantised: bool, share: Any) -> Any:
    """Numbers decoded: codes, and what corrects them."""
    return 2 * B * H_kv * (S_kv - Min(S_kv, tail)) * D * share * (1 + corrections) if quantised else 0


def _rebuild(share: Any) -> Any:
    """FLOPs that make keys and values of latents: a product of all the latents of a token for each KV head."""
    return 2 * B * H_kv * (S_kv - Min(S_kv, tail)) * share * D * latents


def _cpp_decode(config: Mapping[str, int | str], quantised: bool) -> Work:
    """One unit is a KV head of a batch row; ``split`` says how units are divided among threads."""
    units = B * H_kv * ceiling(S_q / Max(1, floor(CPP_ROWS * H_kv / H_q)))
    tiles = ceiling(density * S_kv / CPP_TILE)
    split = config.get("split", "stream")
    if split in ("single", "kv"):
        parts = Max(1, Min(P, floor(tiles / CPP_MIN_TILES))) if split == "kv" else sympy.Integer(1)
        pieces = units * parts
        threads = Min(P, pieces)
        load = ceiling(pieces / P) * ceiling(tiles / parts) / (units * tiles)
    elif split == "stream":
        threads = Min(P, Max(1, floor(units * tiles / CPP_MIN_TILES)))
        load, pieces = ceiling(units * tiles / threads) / (units * tiles), units + threads - 1
    else:
        raise ValueError(f"the C++ decode kernel is split 'stream', 'kv' or 'single'; found {split!r}")
    pairs = B * H_q * S_q * S_kv * density
    return _work(
        ATTENTION,
        size=_stored(density) + _queries(),
        resident=_stored(density),
        flops=4 * pairs * D + _rebuild(density),
        rows=pairs,
        codes=_codes(quantised, density),
        load=load,
        pieces=pieces,
        forks=Min(1, threads - 1),
    )


def _triton_decode(config: Mapping[str, int | str], quantised: bool) -> Work:
    """One program reads a part of a KV head; where a KV head has several a second kernel merges them."""
    block, stages = int(config.get("block_n", 64)), int(config.get("stages", 3))
    tiles = ceiling(density * S_kv / block)
    heads = B * H_kv
    split = config.get("split", "kv")
    if split == "stream":  # an even share of all tiles for two programs per multiprocessor, 256 tokens at least
        share = Max(1, ceiling(heads * tiles / (2 * P)), Min(-(-256 // block), heads * tiles))
        programs = ceiling(heads * tiles / share)
        # The parts of a program at its two ends belong to KV heads that it shares with others.
        load, parts = share * ceiling(programs / P) / (heads * tiles), 2 * programs
        is_split: Any = sympy.Integer(1)
    elif split in ("kv", "single"):
        # Two programs per multiprocessor, 256 tokens at least, equally many tiles for every one.
        wanted = Max(1, Min(floor(2 * P / heads), ceiling(density * S_kv / 256)))
        splits = sympy.Integer(config.get("splits", 1)) if split == "single" or "splits" in config else None
        splits = ceiling(tiles / ceiling(tiles / wanted)) if splits is None else splits
        programs = heads * splits
        load = ceiling(tiles / splits) * splits / tiles * ceiling(programs / P) / programs
        is_split = Min(1, splits - 1)
        parts = programs * is_split
    else:
        raise ValueError(f"the Triton decode kernel is split 'kv', 'stream' or 'single'; found {split!r}")
    partials = parts * H_q / H_kv * S_q
    pairs = B * H_q * S_q * S_kv * density
    tile = 2 * block * D * bits / 8
    return _work(
        ATTENTION,
        size=_stored(density) + _queries() + 2 * 4 * partials * (D + 2),
        resident=_stored(density),
        # Tensor cores work on whole tiles of rows, however few queries there are.
        flops=4 * pairs * D * Max(1, TRITON_ROWS * H_kv / (H_q * S_q)) + _rebuild(density),
        rows=pairs,
        # Each number of a tile is compared with the places of all outliers of its group.
        codes=_codes(quantised, density) + (_codes(quantised, density) / (1 + corrections) * outliers),
        load=load,
        pieces=partials,
        launches=1 + is_split,
        in_flight=Max(1, stages - 1) * tile * Max(1, Min(2, programs / P)),
        shared=stages * (tile + Min(1, latents) * TRITON_LATENTS * (block + D) * width) + TRITON_ROWS * D * width,
    )


def _composed_decode(config: Mapping[str, int | str], quantised: bool) -> Work:
    """sdpa over keys and values in full precision, repeated for every query head, with a materialised mask."""
    _no_config("composed", config)
    made = 2 * B * S_kv * D * width * (H_q * Min(1, H_q / H_kv - 1) + (H_kv if quantised else 0))
    tasks = B * H_q * ceiling(S_q / SDPA_ROWS)
    pairs = B * H_q * S_q * S_kv
    return _work(
        ATTENTION,
        size=_stored(1) + _queries() + 2 * made + S_q * S_kv * (1 + width),
        resident=_stored(1) + made,
        flops=4 * pairs * D + _rebuild(1),
        rows=pairs,
        codes=_codes(quantised, 1),
        load=ceiling(tasks / P) / tasks,
        launches=COMPOSED_OPERATORS + (2 * DEQUANTISE_OPERATORS if quantised else 0),
        forks=1,
    )


def _composed_prefill(config: Mapping[str, int | str], quantised: bool) -> Work:
    """sdpa with a mask: it multiplies what the mask hides, and every query head gets its keys and values."""
    _no_config("composed", config)
    repeats = Min(1, H_q / H_kv - 1)
    tasks = B * H_q * ceiling(S_q / SDPA_ROWS)
    pairs = B * H_q * S_q * S_kv
    return _work(
        ATTENTION,
        size=_stored(1) + _queries() + 4 * repeats * B * H_q * S_kv * D * width + S_q * S_kv * (2 + width),
        resident=_stored(1) + _queries(),
        flops=4 * pairs * D,
        rows=pairs,
        load=ceiling(tasks / P) / tasks,
        launches=COMPOSED_OPERATORS,
        forks=1,
    )


def _reference_attention(config: Mapping[str, int | str], quantised: bool) -> Work:
    """Everything in float32, one operator after the other: each score is written and read by a dozen of them."""
    _no_config("the reference", config)
    pairs = B * H_q * S_q * S_kv
    widened = 2 * B * H_kv * S_kv * D * 4
    return _work(
        ATTENTION,
        size=_stored(1) + _queries() + 2 * widened + 12 * 4 * pairs,
        resident=_stored(1) + widened + 3 * 4 * pairs,
        flops=4 * pairs * D + _rebuild(1),
        rows=pairs,
        codes=_codes(quantised, 1),
        launches=REFERENCE_OPERATORS + (2 * DEQUANTISE_OPERATORS if quantised else 0),
        forks=REFERENCE_OPERATORS / 2,
    )


def _cpp_prefill(config: Mapping[str, int | str], quantised: bool) -> Work:
    """Blocks of queries visit whole tiles of keys, taken by whichever thread is free; keys and values are packed."""
    _no_config("the C++ prefill kernel", config)
    # Half of a block and half of a tile more than a query sees, at either end of what it sees.
    visited = Min(S_kv, density * S_kv + (CPP_BLOCK + CPP_TILE) / 2)
    pairs = B * H_q * S_q * visited
    tasks = B * H_q * ceiling(S_q / CPP_BLOCK)
    return _work(
        ATTENTION,
        size=3 * _stored(1) + _queries(),
        resident=_stored(1) + _queries(),
        flops=4 * pairs * D,
        rows=pairs,
        load=ceiling(tasks / P) / tasks,
        pieces=tasks,
        forks=2,
    )


def _triton_prefill(config: Mapping[str, int | str], quantised: bool) -> Work:
    """Blocks of queries visit the tiles of keys that they see; keys and values are read again by every block."""
    rows, block, stages = (
        int(config.get(name, least)) for name, least in (("block_m", 128), ("block_n", 64), ("stages", 3))
    )
    visited = Min(S_kv, density * S_kv + sympy.Rational(rows + block, 2))
    tasks = B * H_q * ceiling(S_q / rows)
    pairs = B * H_q * rows * ceiling(S_q / rows) * visited
    return _work(
        ATTENTION,
        size=_stored(1) + _queries(),
        resident=_stored(1) + _queries(),
        flops=4 * pairs * D,
        rows=pairs,
        load=ceiling(tasks / P) / tasks,
        shared=stages * 2 * block * D * width + rows * D * width,
    )


def _cpp_linear(config: Mapping[str, int | str], quantised: bool) -> Work:
    """Every weight is read once, rows of it divided among the threads."""
    _no_config("the C++ linear kernel", config)
    return _work(
        LINEAR,
        size=K * N * width + M * (K + N) * width,
        resident=K * N * width,
        flops=2 * M * K * N,
        forks=1,
    )


def _reference_linear(config: Mapping[str, int | str], quantised: bool) -> Work:
    """A matrix product in float32; weights of 16 bits are widened first, written and read once more."""
    _no_config("the reference", config)
    widened = Min(1, 4 - width)
    return _work(
        LINEAR,
        size=K * N * (width + 8 * widened) + M * (K + N) * width,
        resident=K * N * (width + 4 * widened),
        flops=2 * M * K * N,
        codes=K * N * widened,
        launches=4 * matrices,
        forks=2 * matrices,
    )


def _cpp_sparse(config: Mapping[str, int | str], quantised: bool) -> Work:
    """Neurons or inputs that count are read once, a part of them by each thread, whose sums are added up."""
    _no_config("the C++ kernel of a part of the weights", config)
    return _work(
        LINEAR,
        size=K * N * width * density + M * (K + N) * width,
        resident=K * N * width * density,
        flops=2 * M * K * N * density,
        forks=2,
    )


def _reference_sparse(config: Mapping[str, int | str], quantised: bool) -> Work:
    """What counts of the weights is copied, then widened, then multiplied."""
    _no_config("the reference", config)
    widened = Min(1, 4 - width)
    return _work(
        LINEAR,
        size=K * N * density * (3 * width + 8 * widened) + M * (K + N) * width,
        resident=K * N * density * (2 * width + 4 * widened),
        flops=2 * M * K * N * density,
        codes=K * N * density * widened,
        launches=8 * matrices,
        forks=3 * matrices,
    )


def _no_config(name: str, config: Mapping[str, int | str]) -> None:
    if config:
        raise ValueError(f"{name} has no free choices; found {dict(config)}")
