"""Properties of the KV formats: error bounds, exact constants, append in any pieces, truncate and continue."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat

CPU = torch.device("cpu")
INT8 = [KVFormat("int8", "float32", 24, axis, block=16) for axis in ("channel", "token")]
GEAR = [replace(fmt, rank=2, outliers=4) for fmt in INT8]
FORMATS = [KVFormat("dense", "float32", 24), *INT8, *GEAR]
IDS = ["dense", "int8-channel", "int8-token", "gear-channel", "gear-token"]


def filled(fmt: KVFormat, pieces: list[torch.Tensor]) -> torch.Tensor:
    buf = kv_format.allocate(fmt, 2, 3, 100, CPU)
    at = 0
    for piece in pieces:
        kv_format.append(fmt, buf, at, piece)
        at += piece.shape[2]
    return buf


@pytest.mark.parametrize("spread", [1e-2, 1.0, 300.0])
@pytest.mark.parametrize("fmt", INT8, ids=IDS[1:3])
def test_quantisation_error_is_at_most_half_a_scale(fmt: KVFormat, spread: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 16, 24) * spread + 2 * spread
    codes, scales, minima = kv_format.quantise(fmt, x)
    dim = -2 if fmt.axis == "channel" else -1
    error = (kv_format.dequantise(fmt, codes, scales, minima) - x).abs()
    # 2^-11: the relative rounding of a float16 minimum.
    bound = scales.float() / 2 + minima.float().abs() * 2**-11 + 1e-6 * spread
    assert (error <= bound.unsqueeze(dim)).all()


@pytest.mark.parametrize("fmt", [*INT8, *GEAR], ids=IDS[1:])
def test_constant_groups_are_exact(fmt: KVFormat) -> None:
    x = torch.full((1, 16, 24), -1.375)
    assert torch.equal(kv_format.dequantise(fmt, *kv_format.quantise(fmt, x)), x)


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_all_at_once_is_token_by_token(fmt: KVFormat) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 53, 24)
    at_once, in_pieces = filled(fmt, [x]), filled(fmt, list(x.split([1, 15, 1, 20, 16], 2)))
    for start, end in ((0, 53), (3, 20), (32, 48), (50, 53), (7, 7)):
        a, b = (kv_format.read(fmt, buf, start, end, 53) for buf in (at_once, in_pieces))
        assert a.shape == (2, 3, end - start, 24)
        assert torch.equal(a, b)


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_recent_tokens_are_exact_and_older_ones_close(fmt: KVFormat) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 53, 24)
    got = kv_format.read(fmt, filled(fmt, [x]), 0, 53, 53)
    assert torch.equal(got[:, :, 48:], x[:, :, 48:])
    assert (got - x).abs().max() < (1e-9 if fmt.kind == "dense" else 0.02)


@pytest.mark.parametrize("length", [0, 5, 16, 40, 48, 52])
@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_truncate_keeps_what_is_read_and_continues(fmt: KVFormat, length: int) -> None:
    torch.manual_seed(0)
    buf = filled(fmt, [torch.randn(2, 3, 53, 24)])
    before = kv_format.read(fmt, buf, 0, length, 53).clone()
    kv_format.truncate(fmt, buf, 53, length)
    assert torch.equal(kv_format.read(fmt, buf, 0, length, length), before)
    more = torch.randn(2, 3, 9, 24)
    kv_format.append(fmt, buf, length, more)
    after = kv_format.read(fmt, buf, 0, length + 9, length + 9)
    assert (after[:, :, length:] - more).abs().max() < 0.02
    assert (after[:, :, :length] - before).abs().max() < 0.02 if length else True


def test_capacity_is_whole_blocks_and_bytes_are_counted() -> None:
    for fmt in (*INT8, *GEAR, KVFormat("int2", "float32", 7, "channel", block=16, rank=1, outliers=2)):
        buf = kv_format.allocate(fmt, 1, 1, 33, CPU)
        assert kv_format.capacity(fmt, buf) == 48
        assert buf.shape[2] == fmt.tail_bytes + 3 * fmt.block_bytes and fmt.block_bytes % 4 == 0
        assert sum(part[0, 0, 0].nbytes for part in kv_format.blocks(fmt, buf)) <= fmt.block_bytes
    plain, gear = INT8[0], GEAR[0]
    factors, outliers = 2 * 2 * (16 + 24), 3 * 4 * 24
    assert gear.block_bytes == plain.block_bytes + factors + outliers
    assert kv_format.capacity(FORMATS[0], kv_format.allocate(FORMATS[0], 1, 1, 33, CPU)) == 33


def test_the_empty_format_stores_nothing() -> None:
    kind: Literal["empty"] = "empty"
    fmt = KVFormat(kind, "float32", 8)
    buf = kv_format.allocate(fmt, 1, 1, 10, CPU)
    kv_format.append(fmt, buf, 0, torch.ones(1, 1, 3, 8))
    assert buf.numel() == 0
    with pytest.raises(ValueError, match="no tokens to read"):
        kv_format.read(fmt, buf, 0, 1, 3)
