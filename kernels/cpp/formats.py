"""What the C++ templates are told about a KV format, and which formats they know."""

from __future__ import annotations

from ..spec import KVFormat

C_TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}
MAX_HEAD_DIM = 256
MAX_BLOCK = 256


def unsupported(fmt: KVFormat, name: str = "token") -> str | None:
    """Why the C++ kernels cannot store ``fmt``, whose tokens are called ``name``, in one line; None if they can."""
    if fmt.kind == "empty":
        return f"the {name}s are not stored (format 'empty'), so nothing can be attended to"
    if not 1 <= fmt.head_dim <= MAX_HEAD_DIM:
        return f"the C++ kernel handles head dims up to {MAX_HEAD_DIM}; found {fmt.head_dim} ({name}s)"
    if not fmt.is_quantised:
        return None
    if fmt.block % 16 or not 16 <= fmt.block <= MAX_BLOCK:
        return f"blocks of codes must hold a multiple of 16 tokens, at most {MAX_BLOCK}; found {fmt.block} ({name}s)"
    size, whole = fmt.group_size, fmt.block if fmt.axis == "channel" else fmt.head_dim
    if whole % size or (size % 16 and size != whole):
        return f"groups of {name}s must be multiples of 16 that divide {whole}; found {size}"
    return None


def symbols(fmt: KVFormat) -> dict[str, object]:
    """The symbols of the macro in formats.jinja."""
    coded = fmt.is_quantised
    return {
        "bits": fmt.bits if coded else 0,
        "per_channel": _bool(fmt.axis == "channel"),
        "channel_quads": _bool(fmt.packing == "channel"),
        "block": fmt.block if coded else 64,
        "group": fmt.group_size if coded else 64 if fmt.axis == "channel" else fmt.head_dim,
        "window": fmt.window if coded else 0,
        "dim": fmt.head_dim,
        "type": C_TYPES[fmt.dtype],
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"
