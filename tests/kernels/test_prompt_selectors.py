"""Policies for prompts: worked examples, causal lists that padding does not change, C++ against stock operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import block_lists, line_cover, ops, prompt_selectors, registry
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.prompt_selectors.adaptive import AdaptiveLines, covering, distance
from torchaccel.kernels.prompt_selectors.covering import CoveringLines
from torchaccel.kernels.prompt_selectors.estimated import EstimatedBlocks
from torchaccel.kernels.prompt_selectors.lines import diagonal_blocks, marked
from torchaccel.kernels.prompt_selectors.patterns import HeadPatterns
from torchaccel.kernels.prompt_selectors.static import ChunkedBlocks, StridedBlocks
from torchaccel.kernels.row_reference import line_scores
from torchaccel.kernels.sparse_prompt import SparsePrompt, first_live, listed, share_read
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

BLOCK = 16
SELECTORS = {
    "estimated": EstimatedBlocks(BLOCK, "antidiagonal", 4, mass=0.5),
    "patterns": HeadPatterns(
        BLOCK,
        (("vertical_and_slash", 31, 110), ("a_shape", 20, 40), ("block_sparse", 3, 0), ("vertical_and_slash", 40, 101)),
    ),
    "adaptive": AdaptiveLines(BLOCK, 0.4, 0.6, 32),
    "covering": CoveringLines(BLOCK, 0.5, 8, 8),
    "strided": StridedBlocks(BLOCK, 1, 2, 3),
    "chunked": ChunkedBlocks(BLOCK, 2, 1, 5, 20),
}
needs_compiler = pytest.mark.skipif(
    toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain())
)


def attention(dim: int = 42, group: int = 2, dtype: str = "float32", scale: float = 0.2) -> AttentionSpec:
    dense = KVFormat("dense", dtype, dim)
    return AttentionSpec("prefill", dim, group, dtype, dense, dense, scale)


def prompt(spec: AttentionSpec, tokens: int, padding: int = 0, heads: int = 2) -> tuple[Tensor, Tensor]:
    """q and k of one row, with ``padding`` tokens of NaN before them."""
    torch.manual_seed(tokens)
    q, k = (
        torch.randn(1, tokens, n, spec.head_dim).mul(2).to(DTYPES[spec.dtype]).transpose(1, 2)
        for n in (heads * spec.group, heads)
    )
    poison = torch.full((1, 1, padding, spec.head_dim), torch.nan, dtype=q.dtype)
    return tuple(torch.cat([poison.expand(-1, x.shape[1], -1, -1), x], 2) for x in (q, k))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SELECTORS)
def test_lists_are_causal_sorted_and_those_of_the_row_alone(name: str, dtype: str) -> None:
    spec, selector = attention(dtype=dtype), SELECTORS[name]
    alone = selector.select(spec, *prompt(spec, 460), None)
    blocks = alone.shape[2]
    assert alone.dtype == torch.int32 and alone.shape[:3] == (1, 4, 29)
    for row in alone.flatten(0, 1).tolist():
        for i, entries in enumerate(row):
            chosen = [j for j in entries if j >= 0]
            assert (
                chosen == sorted(set(chosen))
                and chosen[-1] == i
                and entries[len(chosen) :].count(-1) == len(entries) - len(chosen)
            )
    counts = (alone >= 0).sum()
    assert 4 * blocks < counts < 4 * blocks * (blocks + 1) // 2  # more than the own ones, less than all
    for padding in (2 * BLOCK, 5 * BLOCK):
        q, k = prompt(spec, 460, padding)
        shifted = selector.select(spec, q, k, torch.tensor([padding]))
        before = padding // BLOCK
        assert (shifted[:, :, :before] == -1).all()
        got = torch.where(shifted < 0, shifted, shifted - before)[:, :, before:]
        assert torch.equal(got[..., :blocks], alone) and (got[..., blocks:] == -1).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_a_key_gives_the_selector_back(name: str) -> None:
    assert prompt_selectors.from_key(SELECTORS[name].key()) == SELECTORS[name]


def test_short_prompts_have_lists_too() -> None:
    spec = attention()
    for selector in SELECTORS.values():
        for tokens in (1, 6, 17):
            lists = selector.select(spec, *prompt(spec, tokens), None)
            assert (lists.amax(-1) == torch.arange(-(-tokens // BLOCK))).all()


@needs_compiler
def test_compiled_lists_are_those_of_stock_operators() -> None:
    generator = torch.Generator().manual_seed(0)
    compiled = registry.block_lists("cpu")
    assert compiled is not block_lists.block_lists
    for blocks, share in ((1, 0.5), (6, 0.2), (123, 0.05)):
        columns, diagonals = (torch.rand(3, 2, blocks, generator=generator) < share for _ in range(2))
        pairs = torch.rand(3, 2, blocks, blocks, generator=generator) < share
        first = torch.tensor([0, 37, 16 * (blocks - 1)]).clamp(max=16 * blocks - 1)
        for args in ((columns, diagonals, None, None), (columns, diagonals, pairs, first)):
            assert torch.equal(compiled(*args, 16), block_lists.block_lists(*args, 16))


@needs_compiler
def test_compiled_cover_is_that_of_stock_operators() -> None:
    compiled = registry.line_cover("cpu")
    assert compiled is not line_cover.line_cover
    torch.manual_seed(0)
    own = torch.randint(0, 23, (2, 42))
    # Whole numbers add up exactly in any order, and give ties.
    weights = torch.randint(0, 9, (2, 3, 42, 23)).float().masked_fill(torch.arange(23) > own[:, None, :, None], 0)
    for part in (0.0, 0.3, 0.9, 1.0):
        for got, expected in zip(compiled(weights, own, part), line_cover.line_cover(weights, own, part), strict=True):
            assert torch.equal(got, expected)


def covers() -> list:
    return [line_cover.line_cover, *([] if toolchain.missing_toolchain() else [registry.line_cover("cpu")])]


def test_loopserve_example() -> None:
    """Column 0 and the main diagonal hold 3.8 of 4."""
    weights = torch.tensor([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.1, 0.4, 0], [0.4, 0.05, 0.05, 0.5]])[None, None]
    for cover in covers():
        columns, diagonals = cover(weights, torch.arange(4)[None], 0.9)
        assert columns.tolist() == [[[True, False, False, False]]] and diagonals.tolist() == columns.tolist()
        every = block_lists.block_lists(*cover(weights, torch.arange(4)[None], 1.0), None, None, 1)
        assert (every >= 0).sum() == 10


def test_flex_prefill_examples() -> None:
    scores = torch.tensor([0.4, 0.1, 0.25, 0.05, 0.2])
    assert [int(covering(scores, part)) for part in (0.4, 0.5, 0.65, 0.9, 0.95)] == [1, 2, 2, 4, 4]
    p, near, far = (torch.tensor(x) for x in ((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.2, 0.2, 0.6)))
    found = [distance(p, x).item() for x in (p, near, far)]
    assert found == pytest.approx([0, 0.0834, 0.4155], abs=1e-4)


def test_minference_line_scores_example() -> None:
    spec = attention(dim=4, group=1, scale=1.0)
    q, k = torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    q[0, 0, 2], q[0, 0, 3] = torch.tensor([2.0, 0, 1, 9]), torch.tensor([1.0, 0, 0, 1])
    columns, diagonals = line_scores(spec, q, k, 2, None)
    torch.testing.assert_close(columns[0, 0], torch.tensor([1.0308, 0.2245, 0.3792, 0.3655]), atol=1e-4, rtol=0)
    torch.testing.assert_close(diagonals[0, 0], torch.tensor([0.6103, 0.2245, 0.7997, 0.3655]), atol=1e-4, rtol=0)


def test_minference_lines_are_within_their_blocks() -> None:
    """Every pair on a chosen line is in a listed block; the example of 8 tokens by hand."""
    torch.manual_seed(0)
    for tokens, block, columns, offsets in ((8, 2, [0, 3], [0, 4]), (250, 16, None, None), (123, 8, None, None)):
        columns = torch.tensor(columns if columns else torch.randperm(tokens)[:4].tolist())
        offsets = torch.tensor(offsets if offsets else torch.randperm(tokens)[:5].tolist())
        count = -(-tokens // block)
        flags = [
            marked(columns[None, None] // block, torch.ones(1, 1, len(columns), dtype=torch.bool), count),
            diagonal_blocks(offsets[None, None], torch.ones(1, 1, len(offsets), dtype=torch.bool), block, count),
        ]
        lists = block_lists.block_lists(*flags, None, None, block)[0, 0].tolist()
        if tokens == 8:
            assert lists == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 3, -1]]
        for i in range(tokens):
            for j in range(i + 1):
                if j in columns.tolist() or i - j in offsets.tolist():
                    assert j // block in lists[i // block]


def test_the_first_live_token_is_read_off_the_mask() -> None:
    causal = torch.ones(6, 6).tril().bool()
    padded = causal & (torch.arange(6) >= 2)
    packed = causal & (torch.arange(6)[:, None] // 3 == torch.arange(6) // 3)
    mask = torch.stack([causal, padded, packed])[:, None]
    additive = torch.zeros(3, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min) - 5.0
    for given in (mask, additive):
        assert first_live(given, 3).tolist() == [0, 2, 0]
    assert first_live(mask[1:2], 2).tolist() == [2, 2] and first_live(None, 2) is None


def test_the_share_that_was_read() -> None:
    every = block_lists.block_lists(*torch.ones(2, 3, 2, 5).bool().unbind(0), None, None, 4)
    assert share_read(every, None, 4) == 1
    none = block_lists.block_lists(*torch.zeros(2, 3, 2, 5).bool().unbind(0), None, torch.tensor([0, 9, 18]), 4)
    # Own blocks count half: 5 + 3 + 1 of 25 + 9 + 1.
    assert share_read(none, torch.tensor([0, 9, 18]), 4).item() == pytest.approx(9 / 35)


def plan(selector: prompt_selectors.PromptSelector, spec: AttentionSpec, least: int = 0) -> SparsePrompt:
    kernels = [Plan(s, ((None, Candidate("reference")),)) for s in (listed(spec, selector), spec)]
    return SparsePrompt(selector, *kernels, least)


def test_the_operator_reads_the_lists_and_is_dense_below_the_switch() -> None:
    ops.library()
    spec, selector = attention(), SELECTORS["patterns"]
    q, k = prompt(spec, 330)
    v = torch.randn(1, 2, 330, 42)
    for least in (0, 331):
        sparse = plan(selector, spec, least)
        assert SparsePrompt.from_key(sparse.key()) == sparse
        args = (q, k, v, None, sparse.key())
        torch.library.opcheck(torch.ops.torchaccel.attend_prompt_sparse.default, args)
        out, _, share = torch.ops.torchaccel.attend_prompt_sparse(*args)
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * spec.scale
        seen = torch.ones(330, 330).tril().bool().expand(1, 4, -1, -1)
        if not least:
            read = torch.zeros(1, 4, 21, 22).bool().scatter_(3, selector.select(spec, q, k, None).long() % 22, True)
            seen = seen & read[..., :21].repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :330, :330]
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        assert (share == 1) == bool(least)


def test_the_switch_is_the_first_length_that_is_sparse() -> None:
    spec = attention()
    assert plan(EstimatedBlocks(64, mass=1.0), spec).switch() is None
    assert plan(EstimatedBlocks(64, mass=0.9), spec).switch() == 193
    assert plan(EstimatedBlocks(64, mass=0.9), spec, 5000).switch() == 5000
    assert plan(AdaptiveLines(128), spec).switch() == 1025
    assert plan(HeadPatterns(64, (("vertical_and_slash", 1000, 6096),)), spec).switch() == 7097
    assert plan(StridedBlocks(64, 1, 16, 16), spec).switch() == 17 * 64 + 1
    assert plan(ChunkedBlocks(64, 8, 3, 64, 64), spec).switch() == 4 * 512 + 128 + 1


@pytest.mark.parametrize(
    ("selector", "most"),
    [(StridedBlocks(16, 1, 6, 4), 112), (StridedBlocks(16, 2, 1, 9), 48), (ChunkedBlocks(16, 4, 1, 40, 33), 209)],
)
def test_static_lists_hold_the_share_that_is_expected(selector: prompt_selectors.PromptSelector, most: int) -> None:
    spec = attention(dim=6)
    q = torch.full((1, 4, 4000, 6), torch.nan)
    read = share_read(selector.select(spec, q, q[:, ::2], None), None, 16).item()
    assert selector.share(4000) == pytest.approx(read, rel=0.1) and selector.effort(4000) == 0
    # Where everything is expected to be read, it is.
    assert selector.share(most) == 1 > selector.share(most + 1)
    assert share_read(selector.select(spec, q[:, :, :most], q[:, ::2, :most], None), None, 16) == 1


def test_a_plan_for_another_number_of_heads_says_so() -> None:
    spec = attention()
    with pytest.raises(ValueError, match="each of 4 heads, or one for all, is needed; found 2"):
        HeadPatterns(16, (("a_shape", 1, 2),) * 2).select(spec, *prompt(spec, 40), None)
