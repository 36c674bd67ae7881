"""Launch shapes as data: tiles per device family and head dimension, and how many splits of the cache to run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from ..spec import AttentionSpec
from .source import padded

# Shared memory of one thread block, in bytes.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}

# How float32 products are made: three TF32 products on NVIDIA's tensor cores keep about 22 bits, AMD's take float32.
PRECISION = {"sm_80": "tf32x3", "sm_90": "tf32x3", "gfx942": "ieee"}


@dataclass(frozen=True)
class Tile:
    """Rows of queries (``block_m``) by slots (``block_n``), and the warps and pipeline stages that work on them."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """Launch choices of a decode kernel.

    split "kv" divides each KV head's cache among ``splits`` programs (None: ``split_count`` decides on each call),
    "single" is one program for each, "stream" deals all tiles of all KV heads out evenly. ``block_n`` is clipped to
    what a block of codes or a list entry allows.
    """

    block_n: int
    warps: int
    stages: int
    split: Literal["kv", "stream", "single"] = "kv"
    splits: int | None = None


# Starting points taken from public kernels (FlexAttention, FlashAttention, vLLM), shrunk until nothing spills:
# (family, 16 or 32 bits, widest head dimension): without a mask argument, and with one (its addresses take registers).
PREFILL_TILES: dict[tuple[str, str, int], tuple[Tile, Tile]] = {
    ("sm_80", "half", 64): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
    ("sm_80", "half", 128): (Tile(128, 32, 8, 3), Tile(64, 32, 8, 3)),
    ("sm_80", "half", 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("sm_80", "float32", 64): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("sm_80", "float32", 128): (Tile(32, 32, 8, 2), Tile(16, 32, 4, 2)),
    ("sm_80", "float32", 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("sm_90", "half", 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    ("sm_90", "half", 128): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
    ("sm_90", "half", 256): (Tile(64, 32, 8, 3), Tile(32, 32, 8, 3)),
    ("sm_90", "float32", 64): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("sm_90", "float32", 128): (Tile(32, 32, 8, 2), Tile(16, 32, 4, 2)),
    ("sm_90", "float32", 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("gfx942", "half", 64): (Tile(128, 64, 4, 2), Tile(128, 64, 4, 2)),
    ("gfx942", "half", 128): (Tile(128, 32, 4, 2), Tile(128, 32, 4, 2)),
    ("gfx942", "half", 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    ("gfx942", "float32", 64): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("gfx942", "float32", 128): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("gfx942", "float32", 256): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
}
# (family, how the cache is stored, widest head dimension): up to 32 query rows of a KV head, and more rows.
# A tile of codes has at most one block.
DECODE_TILES: dict[tuple[str, str, int], tuple[DecodeConfig, DecodeConfig]] = {
    ("sm_80", "half", 64): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_80", "half", 128): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_80", "half", 256): (DecodeConfig(32, 4, 3), DecodeConfig(32, 8, 3)),
    ("sm_80", "quantised", 64): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_80", "quantised", 128): (DecodeConfig(64, 8, 3), DecodeConfig(64, 8, 2)),
    ("sm_80", "quantised", 256): (DecodeConfig(64, 8, 3), DecodeConfig(64, 8, 3)),
    ("sm_80", "latent", 64): (DecodeConfig(64, 4, 2), DecodeConfig(64, 8, 2)),
    ("sm_80", "latent", 128): (DecodeConfig(64, 8, 2), DecodeConfig(32, 8, 2)),
    ("sm_80", "latent", 256): (DecodeConfig(32, 8, 2), DecodeConfig(32, 8, 2)),
    ("sm_80", "float32", 64): (DecodeConfig(32, 4, 2), DecodeConfig(32, 8, 2)),
    ("sm_80", "float32", 128): (DecodeConfig(16, 8, 2), DecodeConfig(16, 8, 2)),
    ("sm_80", "float32", 256): (DecodeConfig(16, 8, 1), DecodeConfig(16, 8, 1)),
    ("sm_90", "half", 64): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_90", "half", 128): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_90", "half", 256): (DecodeConfig(32, 4, 3), DecodeConfig(32, 8, 3)),
    ("sm_90", "quantised", 64): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_90", "quantised", 128): (DecodeConfig(64, 8, 3), DecodeConfig(64, 8, 3)),
    ("sm_90", "quantised", 256): (DecodeConfig(64, 8, 3), DecodeConfig(64, 8, 3)),
    ("sm_90", "latent", 64): (DecodeConfig(64, 4, 3), DecodeConfig(64, 8, 3)),
    ("sm_90", "latent", 128): (DecodeConfig(64, 8, 3), DecodeConfig(32, 8, 3)),
    ("sm_90", "latent", 256): (DecodeConfig(32, 8, 3), DecodeConfig(32, 8, 3)),
    ("sm_90", "float32", 64): (DecodeConfig(32, 4, 2), DecodeConfig(32, 8, 2)),
    ("sm_90", "float32", 128): (DecodeConfig(16, 8, 2), DecodeConfig(16, 8, 2)),
    ("sm_90", "float32", 256): (DecodeConfig(16, 8, 1), DecodeConfig(16, 8, 1)),
    ("gfx942", "half", 64): (DecodeConfig(64, 4, 2), DecodeConfig(64, 8, 2)),
    ("gfx942", "half", 128): (DecodeConfig(64, 4, 2), DecodeConfig(32, 8, 2)),
    ("gfx942", "half", 256): (DecodeConfig(32, 4, 2), DecodeConfig(32, 8, 1)),
    ("gfx942", "quantised", 64): (DecodeConfig(64, 4, 2), DecodeConfig(64, 4, 1)),
    ("gfx942", "quantised", 128): (DecodeConfig(64, 4, 2), DecodeConfig(64, 4, 1)),
    ("gfx942", "quantised", 256): (DecodeConfig(64, 4, 1), DecodeConfig(64, 4, 1)),
    ("gfx942", "latent", 64): (DecodeConfig(64, 4, 2), DecodeConfig(64, 4, 2)),
    ("gfx942", "latent", 128): (DecodeConfig(64, 4, 2), DecodeConfig(64, 4, 2)),
    ("gfx942", "latent", 256): (DecodeConfig(32, 4, 2), DecodeConfig(32, 4, 2)),
    ("gfx942", "float32", 64): (DecodeConfig(32, 4, 2), DecodeConfig(32, 8, 1)),
    ("gfx942", "float32", 128): (DecodeConfig(32, 4, 1), DecodeConfig(32, 8, 1)),
    ("gfx942", "float32", 256): (DecodeConfig(32, 4, 1), DecodeConfig(32, 4, 1)),
}
# Warps that encode a block, and a block with corrections. The error of so many numbers, in float64, still fits their
# registers; at head dimension 128, 8 warps spill as much as 16 and take twice as long to compile (Triton 3.9, sm_90).
ENCODING_WARPS, CORRECTING_WARPS, CORRECTED_NUMBERS = 8, 16, 8192
# Query rows of a KV head (padded to a power of two) whose accumulator still fits the registers of one program.
MAX_ROWS: dict[tuple[str, int], int] = {
    ("half", 64): 128,
    ("half", 128): 128,
    ("half", 256): 32,
    ("quantised", 64): 128,
    ("quantised", 128): 64,
    ("quantised", 256): 16,
    ("latent", 64): 128,
    ("latent", 128): 64,
    ("latent", 256): 16,
    ("float32", 64): 64,
    ("float32", 128): 32,
    ("float32", 256): 16,
}


def family_of(capability: tuple[int, int] | None) -> str:
    """Table row of a CUDA compute capability; None is an AMD GPU."""
    if capability is None:
        return "gfx942"
    return "sm_90" if capability >= (9, 0) and capability[0] in (9, 10) else "sm_80"


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> tuple[str, int]:
    """Family and number of multiprocessors of ``device``; Triton's interpreter runs on the CPU as one small sm_90."""
    if device.type != "cuda":
        return "sm_90", 4
    facts = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (facts.major, facts.minor)
    return family_of(capability), facts.multi_processor_count


def width_of(head_dim: int) -> int:
    """The tables' head dimension: the smallest row that holds ``head_dim``."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def storage_of(spec: AttentionSpec) -> str:
    """The tables' name for how a cache is stored: dense in 16 bits is "half"; "float32", "quantised", "latent"."""
    if spec.key_format.kind == "latent":
        return "latent"
    if spec.key_format.is_quantised or spec.value_format.is_quantised:
        return "quantised"
    return "float32" if spec.dtype == "float32" else "half"


def max_rows(spec: AttentionSpec) -> int:
    """How many query rows of a KV head (group x new tokens, padded) one decode program can hold."""
    return MAX_ROWS[storage_of(spec), width_of(spec.head_dim)]


def decode_config(spec: AttentionSpec, family: str, rows: int) -> DecodeConfig:
    """Launch choices for ``rows`` query rows per KV head (already a power of two)."""
    few, many = DECODE_TILES[family, storage_of(spec), width_of(spec.head_dim)]
    config = few if rows <= 32 else many
    formats = spec.key_format, spec.value_format
    if spec.index == "tokens" and any(fmt.is_corrected or fmt.kind == "latent" for fmt in formats):
        # Every token brings addresses, and corrections, of a block of its own: 175 KB, or spilt registers, otherwise.
        return replace(config, block_n=min(config.block_n, 32), stages=min(config.stages, 2))
    return config


def completion_warps(spec: AttentionSpec) -> int | None:
    """Warps that encode a complete block of keys or values; None where one program cannot hold what that takes."""
    formats = spec.key_format, spec.value_format
    numbers = max(fmt.block * padded(fmt.head_dim) if fmt.is_corrected else 0 for fmt in formats)
    if numbers > CORRECTED_NUMBERS:
        return None
    return CORRECTING_WARPS if numbers else ENCODING_WARPS


def prefill_tile(spec: AttentionSpec, family: str) -> Tile:
    """Launch choices of a prefill kernel."""
    bits = "float32" if spec.dtype == "float32" else "half"
    plain, masked = PREFILL_TILES[family, bits, width_of(spec.head_dim)]
    return plain if spec.mask == "none" else masked


def split_count(tokens: int, block_n: int, work: int, processors: int) -> int:
    """In how many programs to split one KV head's ``tokens``.

    ``work`` is the number of programs without splitting (batch rows x KV heads). Two programs per multiprocessor, at
    least 256 tokens each, and no more programs than leave every one the same number of tiles.
    """
    tiles = -(-tokens // block_n)
    splits = max(1, min(2 * processors // work, -(-tokens // 256)))
    each = -(-tiles // splits)
    return -(-tiles // each) if each else 1


def stream_tiles(total: int, block_n: int, processors: int) -> int:
    """How many of ``total`` tiles a stream program takes: two programs per multiprocessor, at least 256 tokens each."""
    return max(-(-total // (2 * processors)), min(-(-256 // block_n), total), 1)
