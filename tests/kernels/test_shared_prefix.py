"""Rows that share prefixes attend as if each had all tokens for itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import kv_format, ops, reference, registry, shared_prefix
from torchaccel.kernels.candidates import Candidate, build, candidates
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.shared_prefix import Level, Part
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

from tests.kernels.cpp_support import cases
from tests.kernels.cpp_support.cases import CPU, TOLERANCE, poisoned

BATCH, HEADS, GROUP, DIM = 4, 2, 3, 42
# Of the prefixes: for all rows, for pairs of rows, an empty one; and tokens of each row's own.
LEVELS, OWN = ((1, 100), (2, 70), (1, 0)), 5

SPECS = {
    "float32": cases.spec("float32", DIM, GROUP),
    "float32_additive": cases.spec("float32", DIM, GROUP, mask="additive"),
    "bfloat16_bool": cases.spec("bfloat16", DIM, GROUP, mask="bool"),
    "int8_bool": cases.spec("float32", 48, GROUP, "int8", "int8", mask="bool", softcap=4.0),
}


def plans(spec: AttentionSpec, implementation: str) -> list[str]:
    """Keys of the plans of both kernels: of their seeds, or of the reference."""
    found = []
    for part in shared_prefix.specs(spec):
        candidate = candidates(part, "cpu")[0] if implementation == "seed" else Candidate("reference")
        found.append(Plan(part, ((None, candidate),)).key())
    return found


def stored(fmt: KVFormat, tokens: Tensor, room: int = 0) -> Tensor:
    buf = poisoned(fmt, tokens.shape[0], tokens.shape[1], tokens.shape[2] + room)
    kv_format.append(fmt, buf, 0, tokens)
    return buf


def padding(kind: str, new: int, rows: int, heads: int) -> Tensor | None:
    """Left padding that differs within every group, a hole, the future hidden; "additive" carries biases, too."""
    if kind == "none":
        return None
    columns = sum(n for _, n in LEVELS) + OWN + new
    column = torch.arange(columns)
    allowed = column >= torch.tensor([3, 0, 120, 7])[:rows, None, None, None]
    allowed = allowed & (column <= torch.arange(columns - new, columns)[:, None]) & (column != 130)
    allowed = allowed.expand(rows, heads, new, columns)
    if kind == "bool":
        return allowed
    return torch.randn(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("name", "new", "mask_rows", "mask_heads", "implementation"),
    [
        ("float32", 1, 0, 0, "seed"),
        ("float32_additive", 3, 4, 1, "seed"),
        ("bfloat16_bool", 1, 4, 1, "seed"),
        ("int8_bool", 1, 1, 1, "seed"),
        ("float32", 3, 0, 0, "reference"),
        ("float32_additive", 1, 4, 6, "reference"),
        ("float32_additive", 3, 4, 6, "reference"),
        ("bfloat16_bool", 3, 1, 1, "reference"),
        ("int8_bool", 3, 4, 1, "reference"),
    ],
)
def test_levels_are_concatenated_attention(
    name: str, new: int, mask_rows: int, mask_heads: int, implementation: str
) -> None:
    torch.manual_seed(new)
    spec = SPECS[name]
    formats = spec.key_format, spec.value_format

    def tokens(entries: int, n: int) -> list[Tensor]:
        return [torch.randn(entries, HEADS, n, spec.head_dim).to(DTYPES[spec.dtype]) for _ in formats]

    def buffers(pair: list[Tensor], room: int) -> list[Tensor]:
        return [stored(fmt, t, room) for fmt, t in zip(formats, pair, strict=True)]

    shared = [buffers(tokens(entries, n), 9) for entries, n in LEVELS]
    own, fresh = tokens(BATCH, OWN), tokens(BATCH, new)
    q = torch.randn(BATCH, HEADS * GROUP, new, spec.head_dim).to(DTYPES[spec.dtype])
    mask = padding(spec.mask, new, mask_rows, mask_heads)
    lens = torch.tensor([[0, OWN, OWN], *([0, n, n] for _, n in LEVELS)])
    prefixes = [buffer for level in shared for buffer in level]
    ops.library()
    args = (q, *fresh, *buffers(own, new + 3), lens, mask, prefixes)
    got = torch.ops.torchaccel.attend_shared(*args, *plans(spec, implementation))
    # What is read back of codes is what attention should see.
    whole = []
    for i, fmt in enumerate(formats):
        parts = [
            kv_format.read(fmt, level[i], 0, n, n).repeat_interleave(BATCH // entries, 0)
            for level, (entries, n) in zip(shared, LEVELS, strict=True)
        ]
        whole.append(torch.cat([*parts, own[i]], 2))
    length = whole[0].shape[2]
    dense = KVFormat("dense", spec.dtype, spec.head_dim)
    want = reference.decode_attention(
        replace(spec, key_format=dense, value_format=dense),
        q, *fresh, *(stored(dense, t, new) for t in whole), torch.tensor([0, length, length]), mask, None,
    )  # fmt: skip
    assert isinstance(want, Tensor)
    tolerance = 1e-4 if name == "int8_bool" else TOLERANCE[spec.dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)


def test_the_operator_declares_what_it_does() -> None:
    spec = SPECS["float32"]
    q, new = torch.randn(BATCH, HEADS * GROUP, 1, DIM), torch.randn(BATCH, HEADS, 1, DIM)
    own, prefix = torch.randn(BATCH, HEADS, 9, DIM), torch.randn(1, HEADS, 64, DIM)
    lens = torch.tensor([[0, 5, 5], [0, 60, 60]])
    args = (q, new, new, own, own.clone(), lens, None, [prefix, prefix.clone()], *plans(spec, "reference"))
    ops.library()
    torch.library.opcheck(torch.ops.torchaccel.attend_shared.default, args)


def test_generated_merge_is_the_reference() -> None:
    torch.manual_seed(0)
    q = torch.zeros(BATCH, 6, 2, DIM)
    parts = []
    for share in (4, 2, 1):
        lse = torch.randn(BATCH // share, 6, share * 2) * 3
        lse[0, 0] = -torch.inf  # a row whose part is empty
        parts.append(Part(torch.randn(BATCH // share, 6, share * 2, DIM), lse, share))
    torch.testing.assert_close(registry.merge("cpu")(parts, q), shared_prefix.merge(parts, q), atol=1e-6, rtol=1e-5)


def test_errors() -> None:
    fmt = KVFormat("dense", "float32", DIM)
    spec = AttentionSpec("decode", DIM, 1, "float32", fmt, fmt, 1.0, window=8)
    level = Level(torch.zeros(3, 1, 4, DIM), torch.zeros(3, 1, 4, DIM), 4)
    q = torch.zeros(4, 1, 1, DIM)
    rest = (q, q, q, q, q, torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="a window of 8 tokens reaches into the prefix"):
        shared_prefix.specs(spec)
    with pytest.raises(ValueError, match="no lists"):
        shared_prefix.specs(replace(spec, window=None, positions=True))
    kernels = [build(part, Candidate("reference")) for part in shared_prefix.specs(replace(spec, window=None))]
    with pytest.raises(ValueError, match="3 prefixes cannot be shared evenly by 4 rows"):
        shared_prefix.attend(*kernels, [level], *rest)
    assert q.device == CPU
