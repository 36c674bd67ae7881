"""Which specs one launch of the decode kernels can realise, and why not the others."""

from __future__ import annotations

from .. import rotary
from ..spec import AttentionSpec, KVFormat
from .source import padded
from .tiles import max_rows

MAX_NEW_TOKENS = 16
MAX_RANK = 16


def supports(spec: AttentionSpec, new_tokens: int = 1) -> str | None:
    """Why one launch cannot realise ``spec`` for ``new_tokens`` tokens, or None when it can."""
    keys, values = spec.key_format, spec.value_format
    if spec.phase != "decode":
        return f"decode kernels realise the phase 'decode', not {spec.phase!r}"
    if not 1 <= new_tokens <= MAX_NEW_TOKENS:
        return f"one launch appends 1 to {MAX_NEW_TOKENS} tokens, not {new_tokens}"
    if not 1 <= spec.head_dim <= 256:
        return f"head dimensions up to 256, not {spec.head_dim}"
    for name, fmt in (("key", keys), ("value", values)):
        if fmt.kind == "empty":
            return f"an empty {name} format holds nothing to attend to"
        if fmt.kind == "latent" and name == "value":
            return "keys are rebuilt from latents, values are not"
        if (fmt.dtype, fmt.head_dim) != (spec.dtype, spec.head_dim):
            return f"the {name} format must have the dtype and head dimension of the queries"
        if fmt.is_blocked and (reason := _refuses(fmt)):
            return f"{name} {reason}"
    if keys.is_blocked and values.is_blocked and (keys.block, keys.window) != (values.block, values.window):
        return "keys and values in blocks must have the same block and window"
    if spec.index == "blocks" and (spec.index_block < 16 or spec.index_block % 16):
        return f"lists of blocks of a multiple of 16 slots, not {spec.index_block}"
    if padded(spec.group * new_tokens) > max_rows(spec):
        return (
            f"one program holds {max_rows(spec)} query rows of a KV head at head dimension {spec.head_dim}; "
            f"group x new tokens is {spec.group * new_tokens}"
        )
    if spec.softcap is not None and spec.softcap <= 0:
        return f"softcap must be positive, found {spec.softcap}"
    if spec.window is not None and spec.window < 1:
        return f"window must be at least 1, found {spec.window}"
    return rotary.refused(spec)


def _refuses(fmt: KVFormat) -> str | None:
    size = fmt.group_size
    if fmt.block < 16 or fmt.block & (fmt.block - 1):
        return f"blocks of a power of two tokens from 16 on, not {fmt.block}"
    if fmt.kind == "latent":
        return None
    if fmt.rank > MAX_RANK:
        return f"errors are corrected by factors of rank up to {MAX_RANK}, not {fmt.rank}"
    if fmt.axis == "channel" and (size < 16 or fmt.block % size):
        return f"groups of tokens that divide the block and are multiples of 16, not {size}"
    if fmt.axis == "token" and (fmt.head_dim % size or (size != fmt.head_dim and size & (size - 1))):
        return f"groups of channels that are whole tokens or a power of two that divides them, not {size}"
    return None
