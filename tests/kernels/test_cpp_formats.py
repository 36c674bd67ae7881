"""Generated C++ decode and prefill attention over KV formats, lists, windows of heads and side results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.cpp import attention, window_prefill
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

from tests.kernels.cpp_support.cases import CPU, TOLERANCE, poisoned, random_mask


def dense(dtype: str, dim: int) -> KVFormat:
    return KVFormat("dense", dtype, dim)


def keys(
    kind: Any, dtype: str, dim: int, axis: Any = "channel", group: int = 0, window: int = 0, **more: Any
) -> KVFormat:
    return KVFormat(kind, dtype, dim, axis, 64, group, window, "channel", **more)


def values(
    kind: Any, dtype: str, dim: int, axis: Any = "token", group: int = 0, window: int = 0, **more: Any
) -> KVFormat:
    return KVFormat(kind, dtype, dim, axis, 64, group, window, "token", **more)


def spec(dtype: str, dim: int, group: int, key: KVFormat, value: KVFormat, **changes: Any) -> AttentionSpec:
    return AttentionSpec("decode", dim, group, dtype, key, value, dim**-0.5, **changes)


HALF, FULL = "bfloat16", "float32"
DECODE = {
    "kivi4": spec(
        HALF, 64, 3, keys("int4", HALF, 64, group=32, window=128), values("int4", HALF, 64, group=32, window=128),
    ),
    "kivi2_float": spec(
        FULL, 128, 4, keys("int2", FULL, 128, window=32), values("int2", FULL, 128), lse=True, mass=True,
    ),
    "tokens4_blocks": spec(HALF, 64, 1, keys("int4", HALF, 64, "token"), values("int4", HALF, 64), index="blocks"),
    "mixed_axes_pages": spec(
        "float16", 42, 3, keys("int8", "float16", 42), values("int4", "float16", 42, "channel"),
        index="blocks", index_block=16, mask="bool", lse=True,
    ),
    "dense_pages": spec(HALF, 64, 3, dense(HALF, 64), dense(HALF, 64), index="blocks", index_block=32, mass=True),
    "token_list": spec(HALF, 80, 2, dense(HALF, 80), dense(HALF, 80), index="tokens", lse=True, mass=True),
    "token_list_codes": spec(FULL, 64, 4, keys("int4", FULL, 64, window=64), values("int2", FULL, 64), index="tokens"),
    "token_list_positions": spec(
        FULL, 6, 1, dense(FULL, 6), dense(FULL, 6), index="tokens", positions=True, mask="additive",
    ),
    "head_windows": spec(
        HALF, 64, 4, dense(HALF, 64), values("int8", HALF, 64),
        window=50, sinks=3, head_windows=True, softcap=8.0, lse=True,
    ),
    "gear2": spec(
        HALF, 64, 3, keys("int2", HALF, 64, window=64, rank=2, outliers=2),
        values("int2", HALF, 64, rank=4, outliers=4),
    ),
    "gear_other_axes_pages": spec(
        FULL, 42, 2, keys("int4", FULL, 42, "token", rank=3, outliers=2),
        values("int8", FULL, 42, "channel", outliers=4), index="blocks", index_block=16, mask="bool", lse=True,
    ),
    "gear_groups_token_list": spec(
        "float16", 64, 1, keys("int2", "float16", 64, group=32, rank=5, outliers=2),
        values("int4", "float16", 64, "channel", group=32, outliers=2), index="tokens",
    ),
    "codebook4": spec(
        HALF, 64, 3, keys("int4", HALF, 64, "token", codebook="gaussian"),
        values("int4", HALF, 64, window=64, codebook="gaussian"), mass=True,
    ),
    "codebook2_groups": spec(
        FULL, 128, 6, keys("int2", FULL, 128, "token", group=32, codebook="gaussian"),
        values("int2", FULL, 128, group=32, codebook="gaussian"),
    ),
    "codebook_and_gear_token_list": spec(
        FULL, 42, 2, keys("int4", FULL, 42, "token", codebook="gaussian"),
        values("int2", FULL, 42, rank=1, outliers=42), index="tokens",
    ),
    "side_results": spec(FULL, 123, 1, dense(FULL, 123), dense(FULL, 123), lse=True, mass=True, mask="bool"),
}  # fmt: skip


def random_list(case: AttentionSpec, batch: int, heads: int, slots: int) -> Tensor | None:
    """Half of the blocks or slots in any order, the newest among them or not, between entries that are none."""
    if case.index == "contiguous":
        return None
    count = -(-slots // case.index_block) if case.index == "blocks" else slots
    lists = [torch.randperm(count)[: max(1, count // 2)] for _ in range(batch * heads)]
    return torch.nn.functional.pad(torch.stack(lists).int(), (1, 2), value=-1).view(batch, heads, -1)


def assert_equal(case: AttentionSpec, got: Any, want: Any) -> None:
    got, want = ((x if isinstance(x, tuple) else (x,)) for x in (got, want))
    tolerance = TOLERANCE[case.dtype]
    formats = (case.key_format, case.value_format)
    if case.dtype != "float32" and any(f.is_quantised and f.bits < 8 for f in formats):
        tolerance = max(tolerance, 2e-2)  # q and p are rounded to 8 bits there
    assert len(got) == len(want) == 1 + case.lse + case.mass
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


def check_decode(case: AttentionSpec, kernel: Any, length: int, new: int, start: int, seed: int) -> None:
    torch.manual_seed(seed)
    batch, heads, dtype = 2, 2, DTYPES[case.dtype]
    buffers = []
    for fmt in (case.key_format, case.value_format):
        buf = poisoned(fmt, batch, heads, length + new + 70)
        kv_format.append(fmt, buf, 0, torch.randn(batch, heads, length, case.head_dim).to(dtype))
        buffers.append(buf)
    q = torch.randn(batch, new, heads * case.group, case.head_dim).to(dtype).transpose(1, 2)
    k_new, v_new = (torch.randn(batch, new, heads, case.head_dim).to(dtype).transpose(1, 2) for _ in range(2))
    logical, positions = length - start, None
    if case.positions:
        logical = 2 * length + 5
        shared = 1 if seed % 2 else heads
        positions = torch.full((batch, shared, length + 200), -7, dtype=torch.int32)
        columns = torch.stack([torch.randperm(logical)[:length].sort().values for _ in range(batch * shared)])
        positions[..., :length] = columns.view(batch, shared, length)
    mask = random_mask(case, batch, 1, new, logical + new)
    index = random_list(case, batch, heads, length + new)
    windows = torch.tensor([1, 0], dtype=torch.int32) if case.head_windows else None
    lens = torch.tensor([start, length, logical])

    def run(call: Any) -> tuple[Any, list[Tensor]]:
        mine = [b.clone() for b in buffers]
        slots = None if positions is None else positions.clone()
        return call(q, k_new, v_new, *mine, lens, mask, slots, index, windows), mine

    got, ours = run(kernel)
    want, theirs = run(lambda *args: reference.decode_attention(case, *args))
    assert_equal(case, got, want)
    for fmt, a, b in zip((case.key_format, case.value_format), ours, theirs, strict=True):
        end = length + new
        stored = (kv_format.read(fmt, x, 0, end, end) for x in (a, b))
        assert torch.equal(*stored)


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("name", DECODE)
def test_decode_matches_the_reference(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels of a spec at every length: many rows must not need many tokens to be right."""
    case = DECODE[name]
    monkeypatch.setattr(attention, "MANY_ROWS", 1 if rows == "many" else 10**6)
    kernel = attention.decode_attention(case)
    for seed, (length, new) in enumerate(((1, 1), (6, 1), (42, 3), (123, 1), (700, 2), (190, 70))):
        start = 70 if length == 700 and not case.positions else 0
        check_decode(case, kernel, length, new, start, seed)


@pytest.mark.parametrize("split", attention.SPLITS)
def test_every_split_gives_the_same(split: str) -> None:
    case = spec(HALF, 64, 3, keys("int8", HALF, 64), values("int8", HALF, 64), lse=True, mass=True, mask="bool")
    kernel = attention.decode_attention(case, split=split)
    for length in (1, 600, 3000):
        check_decode(case, kernel, length, 1, 0, length)


def test_errors() -> None:
    case = DECODE["dense_pages"]
    q, new = torch.zeros(1, 3, 1, 64).bfloat16(), torch.zeros(1, 1, 1, 64).bfloat16()
    buf = torch.zeros(1, 1, 8, 64).bfloat16()
    call, lens = attention.decode_attention(case), torch.tensor([0, 4, 4])
    with pytest.raises(ValueError, match="generated for 'index'; found none"):
        call(q, new, new, buf, buf, lens, None, None)
    with pytest.raises(ValueError, match=r"'index' must begin with the sizes \[1, 1\]"):
        call(q, new, new, buf, buf, lens, None, None, torch.zeros(2, 1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="split is one of stream, kv, single"):
        attention.decode_attention(case, split="half")
    swapped = spec(HALF, 64, 1, values("int4", HALF, 64), keys("int4", HALF, 64))
    assert "side by side by channel" in (attention.supports(swapped) or "")


PREFILL = {
    "blocks": {"dtype": HALF, "head_dim": 64, "group": 3, "index": "blocks", "lse": True},
    "blocks_mass": {
        "dtype": FULL, "head_dim": 42, "group": 1, "index": "blocks", "index_block": 32, "mass": True, "mask": "bool",
    },
    "wide_blocks": {
        "dtype": "float16", "head_dim": 128, "group": 2, "index": "blocks", "index_block": 128, "softcap": 8.0,
    },
    "head_windows": {
        "dtype": HALF, "head_dim": 64, "group": 2, "window": 50, "sinks": 3, "head_windows": True,
        "mask": "additive", "lse": True, "mass": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_matches_the_reference(name: str) -> None:
    facts = dict(PREFILL[name])
    dtype, dim = facts["dtype"], facts["head_dim"]
    case = AttentionSpec(
        "prefill", key_format=dense(dtype, dim), value_format=dense(dtype, dim), scale=dim**-0.5, **facts
    )  # type: ignore[arg-type]
    kernel = window_prefill.prefill_attention(case)
    for tokens in (1, 6, 42, 123, 300):
        torch.manual_seed(tokens)
        batch, heads, typed = 2, 2, DTYPES[case.dtype]
        q = torch.randn(batch, tokens, heads * case.group, dim).to(typed).transpose(1, 2)  # type: ignore[call-overload]
        k, v = (torch.randn(batch, tokens, heads, dim).to(typed).transpose(1, 2) for _ in range(2))  # type: ignore[call-overload]
        mask = random_mask(case, batch, 1, tokens, tokens)
        index = None
        if case.index == "blocks":
            blocks = -(-tokens // case.index_block)
            index = torch.full((batch, heads * case.group, blocks, blocks + 1), -1, dtype=torch.int32)
            for lists in index.flatten(0, 1):
                for row, entries in enumerate(lists):
                    chosen = torch.randperm(row + 1)[: row // 2 + 1]
                    entries[: len(chosen)] = chosen.int()
        windows = torch.tensor([1, 0], dtype=torch.int32) if case.head_windows else None
        got = kernel(q, k, v, mask, index, windows)
        assert_equal(case, got, reference.prefill_attention(case, q, k, v, mask, index, windows))


def test_merge_is_attention_over_the_union() -> None:
    case = spec(FULL, 64, 2, dense(FULL, 64), dense(FULL, 64), lse=True, causal=False)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 64), torch.randn(2, 2, 90, 64), torch.randn(2, 2, 90, 64)
    kernel = attention.decode_attention(case)
    parts = [
        kernel(q, None, None, k, v, torch.tensor([first, last, last]), None, None)
        for first, last in ((0, 17), (17, 17), (17, 90))
    ]
    out, lse = reference.merge(parts)
    whole = kernel(q, None, None, k, v, torch.tensor([0, 90, 90]), None, None)
    torch.testing.assert_close(out, whole[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole[1], atol=1e-6, rtol=1e-5)
    assert out.device == CPU
