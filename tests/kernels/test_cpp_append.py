"""The generated C++ bulk append: the same bits as kv_format.append."""

from __future__ import annotations

import pytest
import torch
from torchaccel.kernels import kv_format
from torchaccel.kernels.cpp import append
from torchaccel.kernels.spec import DTYPES, KVFormat

from tests.kernels.cpp_support.cases import CPU, content

FORMATS = [
    KVFormat("int8", "bfloat16", 64, "channel"),
    KVFormat("int8", "float32", 42, "token", block=32, packing="token"),
    KVFormat("int4", "bfloat16", 64, "channel", group=32, window=100),
    KVFormat("int4", "bfloat16", 64, "token", group=32, window=64, packing="token"),
    KVFormat("int2", "float32", 42, "channel", window=16),
    KVFormat("int2", "float16", 64, "channel", group=16, packing="token"),
    KVFormat("int2", "bfloat16", 64, "channel", window=32, rank=2, outliers=2),
    KVFormat("int8", "float32", 42, "token", block=32, packing="token", rank=16, outliers=42),
    KVFormat("int4", "float16", 80, "token", group=16, codebook="gaussian"),
    KVFormat("int2", "float32", 42, "token", block=32, packing="token", codebook="gaussian"),
]
pytestmark = pytest.mark.skipif(append.supports(FORMATS[0]) is not None, reason=str(append.supports(FORMATS[0])))


@pytest.mark.parametrize(("filled", "new"), [(0, 1000), (0, 64), (50, 13), (50, 14), (50, 500), (64, 1)])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.kind}-{f.axis}-{f.window}-{f.rank}-{f.codebook}")
def test_same_bits_as_the_reference(fmt: KVFormat, filled: int, new: int) -> None:
    torch.manual_seed(filled + new)
    theirs = kv_format.allocate(fmt, 2, 3, 1100, CPU)
    kv_format.append(fmt, theirs, 0, torch.randn(2, 3, filled, fmt.head_dim).to(DTYPES[fmt.dtype]))
    ours = theirs.clone()
    x = (torch.randn(2, new, 3, fmt.head_dim) * 10).transpose(1, 2)
    x[..., 0, :] = 0.25  # a constant token, and below a constant channel: their scale is 0
    x[..., 1] = -3.0
    kv_format.append(fmt, theirs, filled, x)
    append.append(fmt)(ours, filled, x)
    for a, b in zip(content(fmt, ours, filled + new), content(fmt, theirs, filled + new), strict=True):
        assert torch.equal(a, b)


def test_errors() -> None:
    fmt = FORMATS[0]
    buf = kv_format.allocate(fmt, 1, 1, 64, CPU)
    with pytest.raises(ValueError, match="64 slots, but 65 tokens"):
        append.append(fmt)(buf, 0, torch.zeros(1, 1, 65, 64).bfloat16())
    assert "is a copy" in (append.supports(KVFormat("dense", "float32", 64)) or "")
    assert "multiple of 16" in (append.supports(KVFormat("int8", "float32", 64, block=8)) or "")
    assert "rank up to 16; found 17" in (append.supports(KVFormat("int2", "float32", 64, rank=17)) or "")
    assert "head dims" in (append.supports(KVFormat("int8", "float32", 300)) or "")
