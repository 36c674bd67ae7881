"""Latent keys and values: rebuilt from what is stored, exact in the tail, by the reference and by generated C++."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.cpp import append, attention
from torchaccel.kernels.latents import read, rebuild
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

from tests.kernels.cpp_support.cases import CPU, TOLERANCE, content, poisoned, random_mask

BATCH, HEADS = 2, 2


def spec(dtype: str, dim: int, group: int, rank: int, value: KVFormat | None = None, **changes: Any) -> AttentionSpec:
    keys = KVFormat("latent", dtype, dim, block=32, window=changes.pop("exact", 16), rank=rank)
    values = KVFormat("dense", dtype, dim) if value is None else value
    return AttentionSpec("decode", dim, group, dtype, keys, values, dim**-0.5, **changes)


VALUES = KVFormat("latent", "float32", 42, block=16, window=1, rank=11)
SPECS = {
    "f32_values": spec("float32", 42, 3, 7, VALUES, exact=1, lse=True, mask="bool"),
    "bf16_dense_keys": AttentionSpec(
        "decode",
        64,
        2,
        "bfloat16",
        KVFormat("dense", "bfloat16", 64),
        KVFormat("latent", "bfloat16", 64, rank=24),
        0.125,
    ),
    "bf16_int8": spec(
        "bfloat16", 64, 3, 16, KVFormat("int8", "bfloat16", 64, "token", block=64, packing="token"), lse=True
    ),
    "f32_positions": spec("float32", 42, 2, 7, exact=0, positions=True, mask="bool", mass=True),
    "f32_pages": spec("float32", 123, 1, 5, index="blocks", index_block=16, mask="additive"),
}


def tables(columns: int, size: int, batch: int = BATCH) -> Tensor:
    """Cosine and sine ``[2, batch, columns, size]``, whose rows begin at different positions."""
    positions = torch.arange(columns)[None, :, None] + 3.0 * torch.arange(batch)[:, None, None]
    angles = (positions * torch.logspace(0, -2, size // 2)).repeat(1, 1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def tokens(
    case: AttentionSpec, projection: Tensor, rotary: Tensor, columns: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that their latents give exactly, the same beside the latents as they are stored, and values."""
    torch.manual_seed(seed)
    fmt, dtype = case.key_format, DTYPES[case.dtype]
    latents = torch.randn(BATCH, HEADS, columns.shape[1], fmt.rank).to(dtype)
    keys = rebuild(latents, projection, rotary, columns).to(dtype)
    return keys, torch.cat([keys, latents], -1), torch.randn(BATCH, HEADS, columns.shape[1], case.head_dim).to(dtype)


def test_rebuilding_is_the_projection_and_the_rotary_embedding() -> None:
    torch.manual_seed(0)
    latents, projection = torch.randn(2, 2, 5, 3), torch.randn(2, 6, 8)
    rotary, columns = tables(9, 6), torch.tensor([[0, 2, 3, 4, 8], [1, 2, 3, 4, 5]])
    got = rebuild(latents, projection, rotary, columns)
    for b in range(2):
        for h in range(2):
            for n in range(5):
                key = torch.cat([latents[b, 0, n], latents[b, 1, n]]) @ projection[h]
                for i in range(3):
                    c, s = (complex(x) for x in rotary[:, b, columns[b, n], i])
                    turned = complex(key[i], key[i + 3]) * (c + 1j * s)
                    key[i], key[i + 3] = turned.real, turned.imag
                torch.testing.assert_close(got[b, h, n], key)


@pytest.mark.parametrize("length", [5, 16, 47, 48, 49, 200])
def test_the_reference_is_dense_attention_where_latents_are_exact(length: int) -> None:
    case = spec("float32", 24, 2, 6, lse=True)
    dense = replace(case, key_format=KVFormat("dense", "float32", 24))
    projection, rotary = torch.randn(HEADS, HEADS * 6, 24), tables(length + 1, 24)
    keys, stored, values = tokens(case, projection, rotary, torch.arange(length + 1).expand(BATCH, -1), length)
    buffers = [kv_format.allocate(fmt, BATCH, HEADS, length + 9, CPU) for fmt in (case.key_format, case.value_format)]
    kv_format.append(case.key_format, buffers[0], 0, stored[:, :, :length])
    buffers[1][:, :, :length] = values[:, :, :length]
    q, lens = torch.randn(BATCH, 4, 1, 24), torch.tensor([0, length, length])
    args = q, stored[:, :, length:], values[:, :, length:], *buffers, lens, None, None, None, None
    got = reference.decode_attention(case, *args, projection=projection, table=rotary)
    plain = torch.nn.functional.pad(keys, (0, 0, 0, 8))
    want = reference.decode_attention(dense, q, None, None, plain, torch.nn.functional.pad(values, (0, 0, 0, 8)),
                                      torch.tensor([0, length + 1, length]), None, None)  # fmt: skip
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    done = case.key_format.quantised(length + 1)
    assert done == max(0, length + 1 - 16) // 32 * 32
    with pytest.raises(ValueError, match="rebuilt by a projection"):
        reference.decode_attention(case, *args)
    if done:
        with pytest.raises(ValueError, match=r"latents\.read rebuilds"):
            kv_format.read(case.key_format, buffers[0], 0, length, length + 1)


def test_truncating_needs_the_tokens_and_goes_on_with_them() -> None:
    case = spec("float32", 24, 2, 6)
    fmt = case.key_format
    projection, rotary, columns = torch.randn(HEADS, 12, 24), tables(100, 24), torch.arange(100).expand(BATCH, -1)
    keys, stored, _ = tokens(case, projection, rotary, columns, 0)
    buf = kv_format.allocate(fmt, BATCH, HEADS, 128, CPU)
    kv_format.append(fmt, buf, 0, stored)
    with pytest.raises(ValueError, match="only latents are stored"):
        kv_format.truncate(fmt, buf, 100, 45)
    kv_format.truncate(fmt, buf, 100, 45, stored[:, :, :45])
    kv_format.append(fmt, buf, 45, stored[:, :, 45:70])
    got = read(fmt, buf, 0, 70, 70, projection, rotary, columns[:, :70])
    torch.testing.assert_close(got, keys[:, :, :70], atol=1e-5, rtol=1e-5)


def check(case: AttentionSpec, kernel: Any, length: int, new: int) -> None:
    dim, dtype = case.head_dim, DTYPES[case.dtype]
    torch.manual_seed(length)
    logical = length + (17 if case.positions else 0)
    total = logical + new
    formats = case.key_format, case.value_format
    projections = [
        torch.randn(HEADS, HEADS * fmt.rank, dim) / dim**0.5 if fmt.kind == "latent" else None for fmt in formats
    ]
    # Only half of the channels are turned, or none.
    rotary = None if case.group == 2 else tables(total, dim // 4 * 2)
    start = 20 if length == 300 and not case.positions else 0
    # Not the keys of their latents: what is exact and what is rebuilt differs.
    stored, values = (torch.randn(BATCH, HEADS, length + new, fmt.width).to(dtype) for fmt in formats)
    buffers = [poisoned(fmt, BATCH, HEADS, length + new + 70) for fmt in (case.key_format, case.value_format)]
    for fmt, buf, x in zip((case.key_format, case.value_format), buffers, (stored, values), strict=True):
        kv_format.append(fmt, buf, 0, x[:, :, :length])
    q = torch.randn(BATCH, new, HEADS * case.group, dim).to(dtype).transpose(1, 2)
    positions = None
    if case.positions:
        positions = torch.full((BATCH, 1, length + 200), -7, dtype=torch.int32)
        positions[..., :length] = torch.arange(length) + 17
    mask = random_mask(case, BATCH, 1, new, total - start)
    index = None
    if case.index == "blocks":
        index = torch.stack([torch.randperm(-(-(length + new) // 16)) for _ in range(BATCH * HEADS)]).int()
        index = index[:, : max(1, index.shape[1] // 2)].reshape(BATCH, HEADS, -1)
    lens = torch.tensor([start, length, logical - start])

    def run(call: Any) -> tuple[Any, list[Tensor]]:
        mine = [b.clone() for b in buffers]
        slots = None if positions is None else positions.clone()
        fresh = stored[:, :, length:], values[:, :, length:]
        of_keys, of_values = (None if x is None else x.to(dtype) for x in projections)
        return call(q, *fresh, *mine, lens, mask, slots, index, None, None, None, of_keys, rotary, of_values), mine

    got, ours = run(kernel)
    want, theirs = run(lambda *args: reference.decode_attention(case, *args))
    got, want = ((x if isinstance(x, tuple) else (x,)) for x in (got, want))
    for a, b in zip(got, want, strict=True):
        tolerance = 2 * TOLERANCE[case.dtype] + 1e-5
        torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)
    for fmt, a, b in zip((case.key_format, case.value_format), ours, theirs, strict=True):
        for x, y in zip(content(fmt, a, length + new), content(fmt, b, length + new), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_matches_the_reference(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SPECS[name]
    if attention.supports(case):
        pytest.skip(str(attention.supports(case)))
    monkeypatch.setattr(attention, "MANY_ROWS", 1 if rows == "many" else 10**6)
    kernel = attention.decode_attention(case)
    for length, new in ((1, 1), (42, 3), (123, 1), (300, 2), (190, 70)):
        check(case, kernel, length, new)


def test_bulk_append_and_errors() -> None:
    case = SPECS["bf16_int8"]
    fmt = case.key_format
    if append.supports(fmt) is None:
        ours, theirs = (kv_format.allocate(fmt, BATCH, HEADS, 300, CPU) for _ in range(2))
        x = torch.randn(BATCH, 250, HEADS, fmt.width).bfloat16().transpose(1, 2)
        append.append(fmt)(ours, 0, x)
        kv_format.append(fmt, theirs, 0, x)
        for a, b in zip(content(fmt, ours, 250), content(fmt, theirs, 250), strict=True):
            assert torch.equal(a, b)
    assert "lists of single tokens" in (attention.supports(replace(case, index="tokens")) or "")
    with pytest.raises(ValueError, match="rank numbers, at least 1"):
        KVFormat("latent", "float32", 64)
