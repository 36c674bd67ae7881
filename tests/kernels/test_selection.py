"""Scores of blocks and the choice by them: the reference against the papers, the C++ against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torchaccel.kernels import ops, reference, selection_reference
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.cpp import selection
from torchaccel.kernels.selection_spec import SelectionSpec, SummarySpec
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

from tests.kernels.test_selection_summary import chosen_channels, poisoned, store

needs_compiler = pytest.mark.skipif(
    toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain())
)


def summary_spec(kind: str, dim: int, dtype: str, block: int = 16, channels: int = 0) -> SummarySpec:
    return SummarySpec(kind, dim, dtype, dtype, block, channels)  # type: ignore[arg-type]


SPECS = {
    "bounds_bf16": SelectionSpec(summary_spec("minmax", 64, "bfloat16"), 3, "bfloat16", 9, sinks=1, recent=2),
    "bounds_f32_pool": SelectionSpec(summary_spec("minmax", 42, "float32"), 4, "float32", 5, "mean", pool=4, recent=1),
    "bounds_f16": SelectionSpec(summary_spec("minmax", 123, "float16"), 1, "float16", 4, mass=0.5, scale=0.05),
    "bounds_mixed": SelectionSpec(SummarySpec("minmax", 6, "bfloat16", "float32", 16), 7, "bfloat16", 3),
    "mean_bf16_softmax": SelectionSpec(
        summary_spec("mean", 80, "bfloat16"), 6, "bfloat16", 12, "softmax", 0.2, pool=2, sinks=1, recent=1, mass=0.6
    ),
    "mean_f32_mass": SelectionSpec(summary_spec("mean", 256, "float32"), 2, "float32", 8, scale=0.3, sinks=2, mass=0.7),
    "labels_bf16": SelectionSpec(summary_spec("channels", 64, "bfloat16", 1, 5), 3, "bfloat16", 100, recent=1),
    "labels_8_bf16": SelectionSpec(summary_spec("channels", 32, "bfloat16", 1, 8), 4, "bfloat16", 250, recent=1),
    "labels_16_bf16": SelectionSpec(summary_spec("channels", 64, "bfloat16", 1, 16), 7, "bfloat16", 300, sinks=2),
    "labels_f32_mean": SelectionSpec(summary_spec("channels", 64, "float32", 1, 16), 2, "float32", 33, "mean"),
}


def case(spec: SelectionSpec, length: int, new: int = 1, batch: int = 2, heads: int = 2, whole: bool = True):
    """Queries and a summary of random keys; whole numbers, whose sums are exact in any order, and give many ties."""
    torch.manual_seed(length)
    dim = spec.summary.head_dim

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape).float() if whole else torch.randn(shape)

    q = numbers(batch, new, heads * spec.group, dim).to(DTYPES[spec.dtype]).transpose(1, 2)
    k = numbers(batch, heads, length, dim).to(DTYPES[spec.summary.dtype])
    first = torch.arange(batch) * (length // 3)
    channels = chosen_channels(spec.summary, batch, heads)
    summary, sums = poisoned(spec.summary, batch, heads, length + 40)
    store(selection_reference.summarise, spec.summary, k, summary, sums, first=first, channels=channels)
    return q, summary, torch.tensor([0, length, length]), first, channels


@needs_compiler
@pytest.mark.parametrize(("length", "new"), [(1, 1), (15, 1), (777, 1), (530, 3), (6003, 2)])
@pytest.mark.parametrize("name", SPECS)
def test_choice_is_that_of_the_reference(name: str, length: int, new: int) -> None:
    spec = SPECS[name]
    # Sums of probabilities are rounded differently, so that only without ties the order is the same.
    args = case(spec, length, new, whole=spec.reduce != "softmax")
    expected = selection_reference.select(spec, *args)
    got = selection.select(spec)(*args)
    assert got.dtype == torch.int32 and torch.equal(got, expected)


@needs_compiler
@pytest.mark.parametrize("large", [lambda i: i % 16 == 0, lambda i: i % 16 == 5, lambda i: i >= 0, lambda i: i > 5990])
def test_a_sample_that_tells_the_wrong_bound(large) -> None:
    """It holds all large scores, none of them, or equal ones: too few or too many reach what it says."""
    spec = SelectionSpec(summary_spec("channels", 16, "bfloat16", 1, 16), 1, "bfloat16", 300)
    q = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    i = torch.arange(6003)
    summary = (large(i) * (1 + i // 16 % 200))[None, None, :, None].bfloat16().expand(-1, -1, -1, 16).contiguous()
    channels = torch.arange(16, dtype=torch.int32)[None, None]
    args = q, summary, torch.tensor([0, 6003, 6003]), None, channels
    assert torch.equal(selection.select(spec)(*args), selection_reference.select(spec, *args))


# Relative to the largest score: another order of summation.
TOLERANCE = 2e-6


@needs_compiler
@pytest.mark.parametrize("name", SPECS)
def test_scores_are_those_of_the_reference(name: str) -> None:
    spec = SPECS[name]
    args = case(spec, 999, 3, whole=False)
    got, expected = selection.scores(spec)(*args), selection_reference.scores(spec, *args)
    seen = expected > -torch.inf
    assert torch.equal(seen, got > -torch.inf) and not seen.all()
    scale = expected[seen].abs().max().item()
    torch.testing.assert_close(got[seen], expected[seen], rtol=0, atol=TOLERANCE * scale)


@needs_compiler
@pytest.mark.parametrize("name", ["bounds_bf16", "mean_bf16_softmax", "labels_bf16"])
def test_threads_share_the_blocks_of_one_head(name: str) -> None:
    spec = replace(SPECS[name], width=40)
    args = case(spec, 20_000, 1, batch=1, heads=1, whole=False)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(selection.select(spec)(*args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@needs_compiler
def test_avx2() -> None:
    for name in ("bounds_bf16", "mean_f32_mass", "labels_bf16", "mean_bf16_softmax"):
        spec = SPECS[name]
        args = case(spec, 700, 2, whole=spec.reduce != "softmax")
        with config.patch({"cpp.simdlen": 256}), pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "compile_source", toolchain.compile_source.__wrapped__)
            narrow = selection.select.__wrapped__(spec)
        assert torch.equal(narrow(*args), selection_reference.select(spec, *args))


def implementations(spec: SelectionSpec) -> list:
    made = [lambda *args: selection_reference.select(spec, *args)]
    return made if selection.supports(spec) else [*made, selection.select(spec)]


def test_quest_example() -> None:
    """Queries, keys, bounds and choice as worked out by hand from Quest, section 3."""
    spec = SelectionSpec(SummarySpec("minmax", 2, "float32", "float32", 2), 1, "float32", 2)
    keys = [(0, 1), (2, -1), (1, 3), (-1, 0), (3, 2), (0, -2), (1, 1), (4, 4)]
    summary, sums = poisoned(spec.summary, 1, 1, 8)
    store(selection_reference.summarise, spec.summary, torch.tensor(keys).float()[None, None], summary, sums)
    q, lens = torch.tensor([1.0, -2.0])[None, None, None], torch.tensor([0, 8, 8])
    assert selection_reference.scores(spec, q, summary, lens).tolist() == [[[4, 1, 7, 2]]]
    for select in implementations(spec):
        assert select(q, summary, lens).tolist() == [[[0, 2]]]


def test_lserve_example() -> None:
    """The figure of LServe: a block's score is that of its best page."""
    spec = SelectionSpec(SummarySpec("minmax", 8, "float32", "float32", 1), 1, "float32", 1, pool=2)
    pages = [
        [(-6, -1, -6, 1, -5, -6, -6, -2), (2, 3, 2, 8, 4, 5, 2, 6)],
        [(0, -2, -8, -3, -8, -7, -3, -3), (4, 6, 3, 4, 2, 4, 5, 7)],
    ]
    q = torch.tensor([1.0, -2, 2, -2, 1, 1, 1, -3])[None, None, None]
    one, both = (torch.tensor([0, n, n]) for n in (1, 2))
    summary = torch.tensor(pages).float()[None, None]
    assert selection_reference.scores(spec, q, summary, one).item() == 23
    assert selection_reference.scores(spec, q, summary, both).item() == 40


def test_double_sparsity_example() -> None:
    """Channels 0 and 2 of four; the three tokens of the paper's formula."""
    spec = SelectionSpec(SummarySpec("channels", 4, "float32", "float32", 1, 2), 1, "float32", 3)
    keys = [(1, 0, 2, 0), (0, 1, 0, 1), (2, 1, -1, 0), (0, 0, 1, 3), (1, 1, 1, 1), (-1, 0, 0, 2)]
    channels = torch.tensor([[[0, 2]]], dtype=torch.int32)
    summary, sums = poisoned(spec.summary, 1, 1, 6)
    k = torch.tensor(keys).float()[None, None]
    store(selection_reference.summarise, spec.summary, k, summary, sums, channels=channels)
    q, lens = torch.tensor([2.0, 0, 1, 0.5])[None, None, None], torch.tensor([0, 6, 6])
    for select in implementations(spec):
        assert select(q, summary, lens, None, channels).tolist() == [[[0, 2, 4]]]


@pytest.mark.parametrize("name", ["bounds_bf16", "mean_f32_mass", "labels_bf16"])
def test_enough_width_reads_everything_live(name: str) -> None:
    spec = replace(SPECS[name], width=400, mass=1.0)
    q, summary, lens, first, channels = case(spec, 300)
    attention = AttentionSpec(
        "decode", 64, spec.group, "float32", *[KVFormat("dense", "float32", 64)] * 2, scale=1.0,
        index="blocks", index_block=spec.block,
    )  # fmt: skip
    for select in implementations(spec):
        index = select(q, summary, lens, first, channels)
        for b in range(2):
            got = reference.listed(attention, index[b : b + 1], 300, 0)
            assert got[..., int(first[b]) :].all() and not got[..., : int(first[b]) // spec.block * spec.block].any()


def test_sinks_and_recent_blocks_count_from_the_first_live_slot() -> None:
    spec = replace(SPECS["bounds_bf16"], width=4)
    q, summary, _, _, _ = case(spec, 320)
    first, lens = torch.tensor([0, 5 * 16 + 3]), torch.tensor([40, 310, 310])
    for select in implementations(spec):
        index = select(q, summary, lens, first)
        for b, begin in ((0, 2), (1, 5)):
            assert (index[b, :, 0] == begin).all() and (index[b, :, -2:] == torch.tensor([18, 19])).all()
    few = torch.tensor([0, 30, 30])
    for select in implementations(spec):
        assert select(q, summary, few, torch.tensor([0, 17])).tolist() == [[[0, 1, -1, -1]] * 2, [[1, -1, -1, -1]] * 2]
        assert (select(q, summary, torch.tensor([20, 20, 0])) == -1)[:, :, 2:].all()
        assert (select(q, summary, few, torch.tensor([64, 64])) == -1).sum() >= 12


def test_a_padded_row_is_chosen_as_when_alone() -> None:
    spec = replace(SPECS["mean_bf16_softmax"], pool=1)
    q, summary, lens, _, _ = case(spec, 330, whole=False)
    pad = 3 * 16
    alone = summary[1:, :, 3:].clone()
    summary[1, :, :3] = torch.nan
    for select in implementations(spec):
        both = select(q, summary, lens, torch.tensor([0, pad]))[1:]
        one = select(q[1:], alone, torch.tensor([0, 330 - pad, 330 - pad]))
        assert torch.equal(torch.where(both < 0, both, both - 3), one)


def test_mass_keeps_the_fewest_blocks_that_hold_it() -> None:
    spec = SelectionSpec(summary_spec("mean", 64, "float32"), 1, "float32", 60, scale=0.5, sinks=1, recent=1, mass=0.8)
    q, summary, lens, _, _ = case(spec, 900, batch=1, whole=False)
    p = torch.softmax(selection_reference.scores(spec, q, summary, lens) * spec.scale, -1)
    for select in implementations(spec):
        index = select(q, summary, lens)
        for row, chosen in zip(p.flatten(0, 1), index.flatten(0, 1), strict=True):
            entries = chosen[chosen >= 0].tolist()
            free = [row[i].item() for i in entries if i not in (0, 56)]
            held = row[entries].sum().item()
            assert 2 < len(entries) < 57
            assert held >= 0.8 - 1e-5 and held - min(free) < 0.8 + 1e-5
            assert min(free) >= max(row[i].item() for i in range(57) if i not in entries)


def test_nested_budgets() -> None:
    spec = replace(SPECS["bounds_bf16"], width=40)
    args = case(spec, 1000, whole=False)[:4]
    for wide, narrow in zip(implementations(spec), implementations(replace(spec, width=12)), strict=True):
        for many, few in zip(wide(*args).flatten(0, 1), narrow(*args).flatten(0, 1), strict=True):
            assert set(few.tolist()) <= set(many.tolist()) | {-1}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_blocks_that_are_not_finite(value: float) -> None:
    """A NaN is read, so that it shows in the result of attention; infinities are ordered."""
    spec = replace(SPECS["mean_f32_mass"], width=3, sinks=0, mass=1.0)
    q, summary, lens, _, _ = case(spec, 320, batch=1, whole=False)
    q, q[..., 0] = torch.zeros_like(q), 1.0
    summary[:, :, 13, 0] = value
    for select in implementations(spec):
        chosen = select(q, summary, lens) == 13
        assert chosen.any(-1).all() if value != -torch.inf else not chosen.any()


@needs_compiler
def test_errors_say_what_was_found() -> None:
    spec = SPECS["labels_bf16"]
    q, summary, lens, first, channels = case(spec, 100)
    select = selection.select(spec)
    with pytest.raises(ValueError, match="contiguous int32"):
        select(q, summary, lens, first, None)
    with pytest.raises(ValueError, match=r"found torch\.float32"):
        select(q, summary.float(), lens, first, channels)
    with pytest.raises(RuntimeError, match="has 140 rows, but the cache holds 141 blocks"):
        select(q, summary, torch.tensor([0, 141, 141]), first, channels)
    assert "head dims up to 256" in (
        selection.supports(replace(spec, summary=SummarySpec("mean", 300, "float32", "float32"))) or ""
    )
    assert "found float64" in (selection.supports(replace(spec, dtype="float64")) or "")


def test_specs_refuse_what_cannot_be() -> None:
    summary = SummarySpec("mean", 64, "float32", "float32")
    with pytest.raises(ValueError, match="no room for 2 sinks and 3 recent"):
        SelectionSpec(summary, 1, "float32", 4, sinks=2, recent=3)
    with pytest.raises(ValueError, match="found 0"):
        SelectionSpec(summary, 1, "float32", 4, mass=0)
    with pytest.raises(ValueError, match="blocks of 16 slots"):
        SummarySpec("channels", 64, "float32", "float32", 16, 4)
    with pytest.raises(ValueError, match="channels=65"):
        SummarySpec("channels", 64, "float32", "float32", 1, 65)
    for spec in SPECS.values():
        assert SelectionSpec.from_key(spec.key()) == spec and SummarySpec.from_key(spec.summary.key()) == spec.summary


def test_operators_in_a_compiled_graph() -> None:
    """Fakes, aliasing and mutation are as declared, and the operators give what the reference gives."""
    ops.library()
    spec = SPECS["bounds_bf16"]
    q, summary, lens, first, _ = case(spec, 200)
    k = torch.randn(2, 2, 3, 64).bfloat16()
    sums, summarise_key, select_key = torch.empty(2, 2, 0), spec.summary.key(), spec.key()
    torch.library.opcheck(
        torch.ops.torchaccel.summarise_keys.default, (k, summary, sums, lens, first, None, summarise_key)
    )
    torch.library.opcheck(torch.ops.torchaccel.select_blocks.default, (q, summary, lens, first, None, select_key))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q: Tensor, k: Tensor, summary: Tensor, sums: Tensor, lens: Tensor, first: Tensor) -> Tensor:
        torch.ops.torchaccel.summarise_keys(k, summary, sums, lens, first, None, summarise_key)
        return torch.ops.torchaccel.select_blocks(q, summary, lens + 3, first, None, select_key)

    want = summary.clone()
    selection_reference.summarise(spec.summary, k, want, sums, lens, first)
    expected = selection_reference.select(spec, q, want, lens + 3, first)
    assert torch.equal(step(q, k, summary, sums, lens, first), expected)
    assert torch.equal(summary[0, :, :13], want[0, :, :13])
