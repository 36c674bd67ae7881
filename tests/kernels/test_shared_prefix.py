"""Rows that share prefixes attend as if each had all tokens for itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import kv_format, reference, registry, shared_prefix
from torchaccel.kernels.candidates import Candidate, build, candidates
from torchaccel.kernels.shared_prefix import Level, Part
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

from tests.kernels.cpp_support.cases import CPU, TOLERANCE, poisoned

BATCH, HEADS, GROUP, DIM = 4, 2, 3, 42


def stored(fmt: KVFormat, tokens: Tensor, room: int = 0) -> Tensor:
    buf = poisoned(fmt, tokens.shape[0], tokens.shape[1], tokens.shape[2] + room)
    kv_format.append(fmt, buf, 0, tokens)
    return buf


@pytest.mark.parametrize("implementation", ["seed", "reference"])
@pytest.mark.parametrize(("dtype", "new"), [("float32", 1), ("float32", 3), ("bfloat16", 1)])
def test_levels_are_concatenated_attention(dtype: str, new: int, implementation: str) -> None:
    """A level for all rows, a level for pairs of rows, an empty level, and 5 tokens of each row's own."""
    torch.manual_seed(new)
    fmt = KVFormat("dense", dtype, DIM)
    spec = AttentionSpec("decode", DIM, GROUP, dtype, fmt, fmt, DIM**-0.5)
    kernels = [
        build(part, candidates(part, "cpu")[0] if implementation == "seed" else Candidate("reference"))
        for part in shared_prefix.specs(spec)
    ]
    typed = DTYPES[dtype]

    def tokens(entries: int, n: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.randn(entries, HEADS, n, DIM).to(typed) for _ in range(2))
        return k, v

    pairs = [tokens(1, 100), tokens(2, 70), tokens(1, 0)]
    levels = [Level(stored(fmt, k, 9), stored(fmt, v, 9), k.shape[2]) for k, v in pairs]
    own, fresh = tokens(BATCH, 5), tokens(BATCH, new)
    q = torch.randn(BATCH, HEADS * GROUP, new, DIM).to(typed)
    got = shared_prefix.attend(
        *kernels, levels, q, *fresh, *(stored(fmt, t, new + 3) for t in own), torch.tensor([0, 5, 5])
    )
    whole = [
        torch.cat([*(pair[i].repeat_interleave(BATCH // pair[i].shape[0], 0) for pair in pairs), own[i]], 2)
        for i in (0, 1)
    ]
    length = whole[0].shape[2]
    want = reference.decode_attention(
        spec, q, *fresh, *(stored(fmt, t, new) for t in whole), torch.tensor([0, length, length]), None, None
    )
    assert isinstance(want, Tensor)
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


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
