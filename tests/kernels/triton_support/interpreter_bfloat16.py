"""Make Triton's interpreter compute bfloat16 correctly: it works on the raw 16-bit patterns and truncates casts.

Every operation on bfloat16 operands is done in float32 and rounded to nearest even, as the hardware does. ``install``
changes the interpreter of the running process, so only the interpreter's own process calls it. It also lets a scalar
condition be the mask of a tile, as the compiler does: the interpreter gives comparisons the type of their operands. And
numbers count as such when they are arrays of one element, which Triton 3.6 refuses with numpy from 2.4 on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder: Any = interpreter.InterpreterBuilder
_Handle: Any = interpreter.TensorHandle
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return _Handle(bits.view(np.float32), tl.float32)


def _narrow(data: Any) -> Any:
    """bfloat16 bit patterns of float32 ``data``, rounded to nearest even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


_original = {
    name: getattr(_Builder, name)
    for name in ("create_dot", "binary_op", "unary_op", "ternary_op", "cast_impl", "create_fp_to_fp", "create_splat")
}


def _create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _original["create_dot"](self, _widen(a), _widen(b), _widen(d), *rest)


def _binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
    if not _is_bfloat16(a) or op in _BITWISE:
        return _original["binary_op"](self, a, b, op)
    result = _original["binary_op"](self, _widen(a), _widen(b), op)
    return result if result.data.dtype == np.bool_ else _Handle(_narrow(result.data), tl.bfloat16)


def _unary_op(self: Any, a: Any, op: Any) -> Any:
    if not _is_bfloat16(a):
        return _original["unary_op"](self, a, op)
    return _Handle(_narrow(_original["unary_op"](self, _widen(a), op).data), tl.bfloat16)


def _ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
    if op is np.where or not any(map(_is_bfloat16, (a, b, c))):
        return _original["ternary_op"](self, a, b, c, op)
    return _Handle(_narrow(_original["ternary_op"](self, _widen(a), _widen(b), _widen(c), op).data), tl.bfloat16)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    to_bfloat16 = target.scalar == tl.bfloat16
    if _is_bfloat16(source) and not to_bfloat16:
        wide = _widen(source)
        return wide if target.scalar == tl.float32 else _original["cast_impl"](self, wide, target)
    if to_bfloat16 and not _is_bfloat16(source):
        return _Handle(_narrow(np.asarray(source.data, dtype=np.float32)), target.scalar)
    return _original["cast_impl"](self, source, target)


def _create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if _is_bfloat16(source) or target.scalar == tl.bfloat16:
        return _cast_impl(self, source, target)
    return _original["create_fp_to_fp"](self, source, target, rounding)


def _create_splat(self: Any, kind: Any, scalar: Any) -> Any:
    if scalar.data.dtype == np.bool_:
        return _Handle(np.full(kind.shape, scalar.data.reshape(-1)[0]), tl.int1)
    return _original["create_splat"](self, kind, scalar)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def install() -> None:
    """Put the corrected operations into the interpreter of this process."""
    _Builder.create_dot = _create_dot
    _Builder.binary_op = _binary_op
    _Builder.unary_op = _unary_op
    _Builder.ternary_op = _ternary_op
    _Builder.cast_impl = _cast_impl
    _Builder.create_fp_to_fp = _create_fp_to_fp
    _Builder.create_splat = _create_splat
    interpreter._patch_lang_tensor = _patch_tensor
