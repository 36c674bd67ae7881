"""Generated C++ for appending many tokens to a quantised KV buffer, as after the prefill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

from torch import Tensor

from .. import kv_format
from ..spec import DTYPES, KVFormat, named
from .compile import compile_source, missing_toolchain, render
from .formats import additions, symbols, unsupported

Append = Callable[[Tensor, int, Tensor], None]

FIELDS = ("buffer, buffer_b, buffer_h", "x, x_b, x_h, x_t, x_d", "B, H, filled, n")


def supports(fmt: KVFormat) -> str | None:
    """Why no C++ append can be generated for ``fmt``, in one line for the user; None when one can."""
    if not fmt.is_blocked:
        return f"appending to the format '{fmt.kind}' is a copy, which torch does at memory bandwidth"
    return unsupported(fmt) or missing_toolchain()


def source(fmt: KVFormat) -> str:
    """The C++ source of the append of ``fmt``; equal formats give equal text."""
    return render(
        "bulk_append.cpp.jinja",
        title="torchaccel append to a quantised KV buffer",
        spec=json.dumps(named(asdict(fmt)), sort_keys=True),
        fields=FIELDS,
        format=symbols(fmt),
        **additions(fmt),
    )


@lru_cache(maxsize=256)
def append(fmt: KVFormat) -> Append:
    """The compiled append of ``fmt``: ``kv_format.append`` without its first argument, and with the same bits.

    ``call(buf, filled, new)``: buf as ``kv_format.allocate`` made it, new ``[B, H, n, D]`` of any strides. Raises
    ``ValueError`` for a format that ``supports`` refuses, and when the buffer has no room for the new tokens.
    """
    reason = supports(fmt)
    if reason:
        raise ValueError(reason)
    kernel = compile_source(source(fmt))
    dtype = DTYPES[fmt.dtype]

    def call(buf: Tensor, filled: int, new: Tensor) -> None:
        batch, heads, n, _ = new.shape
        room = kv_format.capacity(fmt, buf)
        if filled + n > room:
            raise ValueError(f"the buffer has {room} slots, but {filled + n} tokens are to be stored: grow it first")
        if new.dtype != dtype:
            new = new.to(dtype)
        strides = buf.stride()
        if strides[2] != 1:
            raise ValueError(f"KV buffers need a contiguous last dimension; found strides {strides}")
        kernel(buf.data_ptr(), *strides[:2], new.data_ptr(), *new.stride(), batch, heads, filled, n)

    return call
