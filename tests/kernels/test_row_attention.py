"""Sums of some rows' attention: the compiled ones against stock operators, and these against a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import registry, row_reference
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.cpp import row_attention
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat


def attention(dim: int, group: int, dtype: str, softcap: float | None = None) -> AttentionSpec:
    dense = KVFormat("dense", dtype, dim)
    return AttentionSpec("prefill", dim, group, dtype, dense, dense, dim**-0.5 * 2, causal=True, softcap=softcap)


SPECS = {
    "bf16": attention(64, 3, "bfloat16"),
    "f32_softcap": attention(42, 1, "float32", 3.0),
    "bf16_odd": attention(123, 2, "bfloat16", 5.0),
    "f16": attention(6, 4, "float16"),
}
needs_compiler = pytest.mark.skipif(
    toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain())
)


def prompt(spec: AttentionSpec, tokens: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed q and k as models pass them, and left padding that holds NaN; the last row is all but padding."""
    torch.manual_seed(tokens)
    q, k = (
        torch.randn(3, tokens, n, spec.head_dim).to(DTYPES[spec.dtype]).transpose(1, 2)
        for n in (heads * spec.group, heads)
    )
    first = torch.tensor([0, tokens * 2 // 5, tokens - 1])
    for b, begin in enumerate(first.tolist()):
        q[b, :, :begin], k[b, :, :begin] = torch.nan, torch.nan
    return q, k, first


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 70, 517])
@pytest.mark.parametrize("name", SPECS)
def test_compiled_sums_are_those_of_stock_operators(name: str, tokens: int) -> None:
    spec = SPECS[name]
    q, k, first = prompt(spec, tokens)
    across = k.transpose(2, 3).contiguous().transpose(2, 3)
    for count, begin, keys in ((37, first, k), (9, None, across[:1])):
        asking = q[: len(keys)]
        got = registry.line_scores(spec, "cpu").run(asking, keys, count, begin)
        for x, y in zip(got, row_reference.line_scores(spec, asking, keys, count, begin), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    rows = torch.randint(0, tokens, (3, 21))
    expected = row_reference.block_weights(spec, q, k, rows, first, 48)
    torch.testing.assert_close(
        registry.block_weights(spec, "cpu").run(q, k, rows, first, 48), expected, atol=1e-5, rtol=1e-5
    )
    assert registry.block_weights(spec, "cpu").name == "cpp"
    # Sets of rows over fewer keys than there are queries; some rows count for nothing.
    keys, places = k[:, :, : -(-tokens // 3)].nan_to_num(), torch.randint(0, tokens, (3, 4, 11))
    keys[1, :, : int(first[1]) // 3] = torch.nan
    ends = torch.randint(0, keys.shape[2] + 1, places.shape)
    args = (q.nan_to_num(), keys, places, ends, first // 3)
    torch.testing.assert_close(
        registry.set_weights(spec, "cpu").run(*args), row_reference.set_weights(spec, *args), atol=1e-4, rtol=1e-4
    )


def test_sums_are_those_of_every_pair() -> None:
    spec = attention(8, 2, "float32", 4.0)
    q, k, first = prompt(spec, 23, 1)
    columns, diagonals = (torch.zeros(3, 2, 23) for _ in range(2))
    blocks = torch.zeros(3, 2, 7, 5)
    for b, begin in enumerate(first.tolist()):
        for h in range(2):
            for i, t in enumerate(range(16, 23)):
                if t < begin:
                    continue
                raw = k[b, 0, begin : t + 1] @ q[b, h, t] * spec.scale
                for j, weight in enumerate(((raw / 4).tanh() * 4).softmax(0), begin):
                    columns[b, h, j] += weight
                    diagonals[b, h, t - j] += weight
                    blocks[b, h, i, j // 5] += weight
    found = row_reference.line_scores(spec, q, k, 7, first)
    torch.testing.assert_close(found, (columns, diagonals))
    rows = row_reference.last_rows(23, 7, 3, q.device)
    torch.testing.assert_close(row_reference.block_weights(spec, q, k, rows, first, 5), blocks)
    sets = rows[:, None, 2:5], rows[:, None, 2:5] + 1
    expected = row_reference.block_weights(spec, q, k, rows[:, 2:5], first, 1).sum(2, keepdim=True)
    torch.testing.assert_close(row_reference.set_weights(spec, q, k, *sets, first), expected)


def test_one_source_serves_specs_that_differ_elsewhere() -> None:
    spec = SPECS["bf16"]
    assert row_attention.source(spec) == row_attention.source(replace(spec, causal=False))
    assert row_attention.source(spec) != row_attention.source(replace(spec, softcap=2.0))
    assert "found 300" in (row_attention.supports(replace(spec, head_dim=300)) or "")
