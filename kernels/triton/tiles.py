"""Launch shapes as data: tiles per device family and head dimension, and how many splits of the cache to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

# Shared memory of one thread block, in bytes.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Tile:
    """Rows of queries (``block_m``) by slots (``block_n``), and the warps and pipeline stages that work on them."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """Launch choices of a decode kernel; ``splits`` None lets ``split_count`` decide on each call."""

    block_n: int
    warps: int
    stages: int
    splits: int | None = None


# Starting points taken from public kernels (FlexAttention, FlashAttention, vLLM): (family, widest head dimension).
PREFILL_TILES: dict[tuple[str, int], Tile] = {
    ("sm_80", 64): Tile(128, 64, 4, 3),
    ("sm_80", 128): Tile(128, 64, 8, 3),
    ("sm_80", 256): Tile(64, 32, 4, 2),
    ("sm_90", 64): Tile(128, 128, 8, 3),
    ("sm_90", 128): Tile(128, 64, 8, 3),
    ("sm_90", 256): Tile(64, 32, 4, 3),
    ("gfx942", 64): Tile(128, 64, 4, 2),
    ("gfx942", 128): Tile(128, 32, 4, 2),
    ("gfx942", 256): Tile(64, 32, 4, 1),
}
# float32 products run on the plain cores here (exact, no TF32), with registers as the limit.
PREFILL_TILES_FLOAT32: dict[tuple[str, int], Tile] = {
    (family, width): Tile(32, 32 if width < 256 else 16, 4, 2 if width < 256 else 1)
    for family in SHARED_LIMIT
    for width in (64, 128, 256)
}
DECODE_TILES: dict[tuple[str, int], DecodeConfig] = {
    ("sm_80", 64): DecodeConfig(64, 4, 3),
    ("sm_80", 128): DecodeConfig(64, 4, 3),
    ("sm_80", 256): DecodeConfig(32, 4, 3),
    ("sm_90", 64): DecodeConfig(64, 4, 3),
    ("sm_90", 128): DecodeConfig(64, 4, 3),
    ("sm_90", 256): DecodeConfig(32, 4, 3),
    ("gfx942", 64): DecodeConfig(64, 4, 2),
    ("gfx942", 128): DecodeConfig(64, 4, 2),
    ("gfx942", 256): DecodeConfig(32, 4, 2),
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


def decode_config(family: str, head_dim: int, rows: int, int8: bool, dtype: str) -> DecodeConfig:
    """Launch choices for ``rows`` query rows per KV head (already a power of two)."""
    seed = DECODE_TILES[family, width_of(head_dim)]
    block_n = 64 if int8 else seed.block_n
    warps, stages = seed.warps, seed.stages
    if rows * width_of(head_dim) > 64 * 128:
        warps = 8
    if dtype == "float32":
        stages = 1 if family == "gfx942" or width_of(head_dim) == 256 else 2
        if not int8:
            block_n = min(block_n, 32)
    if int8 and width_of(head_dim) == 256:
        warps, stages = 8, min(stages, 2)
    return DecodeConfig(block_n, warps, stages)


def prefill_tile(family: str, head_dim: int, dtype: str) -> Tile:
    """Launch choices of a prefill kernel."""
    table = PREFILL_TILES_FLOAT32 if dtype == "float32" else PREFILL_TILES
    return table[family, width_of(head_dim)]


def split_count(tokens: int, block_n: int, work: int, processors: int) -> int:
    """In how many programs to split one KV head's ``tokens``.

    ``work`` is the number of programs without splitting (batch rows x KV heads). Two programs per multiprocessor, at
    least 256 tokens each, and no more programs than leave every one the same number of tiles.
    """
    tiles = -(-tokens // block_n)
    splits = max(1, min(2 * processors // work, -(-tokens // 256)))
    each = -(-tiles // splits)
    return -(-tiles // each) if each else 1
