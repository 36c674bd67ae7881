"""What the C++ templates are told about a KV format, and which formats they know."""

from __future__ import annotations

from .. import codebook, low_rank
from ..spec import KVFormat

C_TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}
MAX_HEAD_DIM = 256
MAX_BLOCK = 256
MAX_RANK = 16


def unsupported(fmt: KVFormat, name: str = "token") -> str | None:
    """Why the C++ kernels cannot store ``fmt``, whose tokens are called ``name``, in one line; None if they can."""
    if fmt.kind == "empty":
        return f"the {name}s are not stored (format 'empty'), so nothing can be attended to"
    if not 1 <= fmt.head_dim <= MAX_HEAD_DIM:
        return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {fmt.head_dim} ({name}s)"
    if not fmt.is_blocked:
        return None
    if fmt.block % 16 or not 16 <= fmt.block <= MAX_BLOCK:
        return f"blocks must hold a multiple of 16 tokens, at most {MAX_BLOCK}; found {fmt.block} ({name}s)"
    if not fmt.is_quantised:
        return None
    size, whole = fmt.group_size, fmt.block if fmt.axis == "channel" else fmt.head_dim
    if whole % size or (size % 16 and size != whole):
        return f"groups of {name}s must be multiples of 16 that divide {whole}; found {size}"
    if fmt.rank > MAX_RANK:
        return f"the C++ kernel corrects errors with factors of rank up to {MAX_RANK}; found {fmt.rank} ({name}s)"
    return None


def symbols(fmt: KVFormat) -> dict[str, object]:
    """The symbols of the macro in formats.jinja."""
    coded = fmt.is_quantised
    return {
        "bits": fmt.bits if coded else 0,
        "per_channel": _bool(fmt.axis == "channel"),
        "channel_quads": _bool(fmt.packing == "channel"),
        "block": fmt.block if fmt.is_blocked else 64,
        "group": fmt.group_size if coded else 64 if fmt.axis == "channel" else fmt.head_dim,
        "window": fmt.window if fmt.is_blocked else 0,
        "dim": fmt.head_dim,
        "type": C_TYPES[fmt.dtype],
        "corrected": fmt.is_corrected,
        "rank": fmt.rank,
        "outliers": fmt.outliers,
        "gaussian": fmt.codebook == "gaussian",
        "latents": fmt.rank if fmt.kind == "latent" else 0,
    }


def additions(*formats: KVFormat) -> dict[str, object]:
    """The symbols of append.cpp.jinja: what the formats of a source need beyond plain codes."""
    return {
        "corrected": any(fmt.is_corrected for fmt in formats),
        "latent": any(fmt.kind == "latent" for fmt in formats),
        "codebooks": [
            (bits, [repr(point) for point in codebook.gaussian(bits)])
            for bits in sorted({fmt.bits for fmt in formats if fmt.codebook == "gaussian"})
        ],
        "rounds": low_rank.ROUNDS,
        "vanished": low_rank.VANISHED,
        "golden": low_rank.GOLDEN,
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"
