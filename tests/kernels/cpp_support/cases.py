"""Specs, poisoned buffers, masks and tolerances shared by the tests of the C++ kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.cpp import attention
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

CPU = torch.device("cpu")

# Absolute, for outputs of about unit size. float32: another order of summation. bfloat16 and float16: one rounding of
# the output (2^-8, 2^-11); with int8 buffers the reference also rounds every dequantised key and value to that type.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}


def spec(
    dtype: str, head_dim: int, group: int, keys: str = "dense", values: str = "dense", **changes: Any
) -> AttentionSpec:
    """A decode spec with the usual scale and the int8 axes that the kernels expect."""
    formats = (
        KVFormat(keys, dtype, head_dim, "channel"),  # type: ignore[arg-type]
        KVFormat(values, dtype, head_dim, "token", packing="token"),  # type: ignore[arg-type]
    )
    return AttentionSpec("decode", head_dim, group, dtype, *formats, scale=head_dim**-0.5, **changes)


SPECS = {
    "f32": spec("float32", 64, 3),
    "bf16_bool": spec("bfloat16", 64, 3, mask="bool"),
    "f16_additive": spec("float16", 80, 1, mask="additive"),
    "f32_int8": spec("float32", 64, 4, "int8", "int8"),
    "bf16_int8_bool": spec("bfloat16", 128, 8, "int8", "int8", mask="bool"),
    "f32_window_bool": spec("float32", 42, 2, mask="bool", window=70, sinks=3),
    "f32_int8_positions_additive": spec("float32", 64, 2, "int8", "int8", mask="additive", positions=True),
    "bf16_softcap": spec("bfloat16", 72, 16, softcap=5.0),
    "f32_static_bool": spec("float32", 64, 2, mask="bool", causal=False),
    "f32_int8_keys_window": spec("float32", 64, 9, "int8", "dense", window=100, sinks=4),
    "f32_additive": spec("float32", 256, 1, mask="additive"),
}


@dataclass
class Inputs:
    """Arguments of one decode call; ``buffers()`` gives fresh copies, because a call writes to them."""

    spec: AttentionSpec
    q: Tensor
    k_new: Tensor | None
    v_new: Tensor | None
    k_buf: Tensor
    v_buf: Tensor
    lens: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)

    def run(self, kernel: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Output, and the buffers and positions that the call left behind."""
        k, v = self.k_buf.clone(), self.v_buf.clone()
        positions = None if self.positions is None else self.positions.clone()
        out = kernel(self.q, self.k_new, self.v_new, k, v, self.lens, self.mask, positions)
        return out, k, v, positions

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the reference gives."""
        return self.run(lambda *args: reference.decode_attention(self.spec, *args))

    def got(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the compiled kernel gives."""
        return self.run(attention.decode_attention(self.spec))


def poisoned(fmt: KVFormat, batch: int, heads: int, capacity: int) -> Tensor:
    """A buffer whose every slot reads as NaN (int8: whose tail, scales and minima do)."""
    buf = kv_format.allocate(fmt, batch, heads, capacity, CPU)
    return buf.fill_(255 if buf.dtype == torch.uint8 else torch.nan)


def inputs(
    case: AttentionSpec, batch: int = 1, heads: int = 2, length: int = 42, new: int = 1, seed: int = 0
) -> Inputs:
    """Random inputs: transposed q, k_new and v_new, as models pass them, and buffers with NaN beyond the end."""
    torch.manual_seed(seed)
    dtype, dim = DTYPES[case.dtype], case.head_dim
    buffers = []
    for fmt in (case.key_format, case.value_format):
        buf = poisoned(fmt, batch, heads, length + new + 70)
        kv_format.append(fmt, buf, 0, torch.randn(batch, heads, length, dim).to(dtype))
        buffers.append(buf)
    q = torch.randn(batch, new, heads * case.group, dim).to(dtype).transpose(1, 2)
    k_new, v_new = (torch.randn(batch, new, heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    return Inputs(case, q, k_new, v_new, *buffers, torch.tensor([0, length, length]))


def random_mask(case: AttentionSpec, batch: int, heads: int, new: int, columns: int) -> Tensor | None:
    """A mask of the spec's kind with about a third of its keys hidden, never the last one."""
    if case.mask == "none":
        return None
    allowed = torch.rand(batch, heads, new, columns) > 0.3
    allowed[..., -1] = True
    if case.mask == "bool":
        return allowed
    return torch.randn(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def assert_same(case: Inputs, got: tuple[Any, ...], expected: tuple[Any, ...], stored: int) -> None:
    """Outputs within the tolerance of the dtype; everything stored, up to slot ``stored``, equal bit for bit."""
    tolerance = TOLERANCE[case.spec.dtype]
    assert got[0].shape == expected[0].shape and got[0].dtype == expected[0].dtype
    torch.testing.assert_close(got[0].float(), expected[0].float(), atol=tolerance, rtol=tolerance, equal_nan=True)
    for fmt, a, b in zip((case.spec.key_format, case.spec.value_format), got[1:3], expected[1:3], strict=True):
        for x, y in zip(content(fmt, a, stored), content(fmt, b, stored), strict=True):
            assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    if case.positions is not None:
        assert torch.equal(got[3], expected[3])


def content(fmt: KVFormat, buf: Tensor, stored: int) -> tuple[Tensor, ...]:
    """The parts of a buffer that hold its first ``stored`` tokens."""
    if fmt.kind == "dense":
        return (buf[:, :, :stored],)
    done = fmt.quantised(stored)
    return (
        *(t[:, :, : done // fmt.block] for t in kv_format.blocks(fmt, buf)),
        kv_format.tail(fmt, buf)[:, :, : stored - done],
    )
