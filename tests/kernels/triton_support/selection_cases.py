"""Cases of summaries and of the choice by them, for decode steps and prompts, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchaccel.kernels import selection_reference
from torchaccel.kernels.selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from torchaccel.kernels.spec import DTYPES
from torchaccel.kernels.triton import prompt_selection, selection, summary

# Scores are float32 sums, in another order: relative to the largest.
TOLERANCE = 4e-6


@dataclass(frozen=True)
class SummaryCase:
    """Keys that arrive in ``steps``; the second row of the batch begins with ``padding`` tokens of NaN."""

    name: str
    spec: SummarySpec
    steps: tuple[int, ...]
    padding: int = 0


@dataclass(frozen=True)
class SelectionCase:
    """A choice among ``length`` slots by ``queries`` tokens; whole numbers are summed exactly, and give many ties.

    choices: with each of its configs.
    """

    name: str
    spec: SelectionSpec
    length: int
    queries: int = 1
    whole: bool = True
    start: int = 0
    padded: bool = True
    choices: bool = False


@dataclass(frozen=True)
class PromptCase:
    """A choice for a prompt whose second row begins with NaN; ``poison``: a NaN among the live keys."""

    name: str
    spec: PromptSelectionSpec
    tokens: int
    poison: bool = False


SUMMARY_CASES = [
    SummaryCase("summary_bounds", SummarySpec("minmax", 42, "bfloat16", "bfloat16", 16), (17, 4, 21), 18),
    SummaryCase("summary_mean", SummarySpec("mean", 64, "float16", "float32", 16), (37, 1, 23, 3), 39),
    SummaryCase("summary_mean_narrowed", SummarySpec("mean", 6, "float32", "bfloat16", 48), (50, 1, 42)),
    SummaryCase("summary_channels", SummarySpec("channels", 42, "bfloat16", "bfloat16", 1, 5), (70, 1, 6), 42),
]


def _pages(kind: str, dim: int, dtype: str, block: int = 16) -> SummarySpec:
    return SummarySpec(kind, dim, dtype, dtype, block)  # type: ignore[arg-type]


SELECTION_CASES = [
    SelectionCase("bounds", SelectionSpec(_pages("minmax", 64, "bfloat16"), 3, "bfloat16", 9, sinks=1, recent=2), 777),
    SelectionCase(
        "bounds_mean_pool",
        SelectionSpec(_pages("minmax", 42, "float32"), 4, "float32", 5, "mean", pool=3, recent=1),
        690,
        queries=6,
    ),
    SelectionCase(
        "bounds_mass", SelectionSpec(_pages("minmax", 123, "float16"), 1, "float16", 14, mass=0.5, scale=0.05), 530
    ),
    SelectionCase(
        "bounds_mixed",
        SelectionSpec(SummarySpec("minmax", 6, "bfloat16", "float32", 16), 7, "bfloat16", 3),
        123,
        choices=True,
    ),
    SelectionCase(
        "mean_softmax",
        SelectionSpec(_pages("mean", 80, "bfloat16"), 6, "bfloat16", 12, "softmax", 0.2, 2, 1, 1, mass=0.6),
        530,
        queries=3,
        whole=False,
    ),
    SelectionCase(
        "mean_mass",
        SelectionSpec(_pages("mean", 256, "float32"), 2, "float32", 8, scale=0.3, sinks=2, mass=0.7),
        330,
        whole=False,
        start=42,
        padded=False,
    ),
    SelectionCase(
        "labels_of_many_tokens",
        SelectionSpec(SummarySpec("channels", 64, "bfloat16", "bfloat16", 1, 5), 3, "bfloat16", 100, recent=1),
        4242,
    ),
    SelectionCase(
        "labels_softmax_in_two_launches",
        SelectionSpec(SummarySpec("channels", 42, "float32", "float32", 1, 16), 2, "float32", 33, "softmax", 0.2),
        600,
        queries=2,
        whole=False,
    ),
    SelectionCase("everything_live", SelectionSpec(_pages("mean", 64, "float32"), 1, "float32", 40, sinks=1), 42),
    SelectionCase("empty_cache", SelectionSpec(_pages("mean", 64, "float32"), 1, "float32", 3), 0),
]
PROMPT_CASES = [
    PromptCase("antidiagonal", PromptSelectionSpec("antidiagonal", 64, 3, "bfloat16", 0.125, 3), 330),
    PromptCase(
        "antidiagonal_mass",
        PromptSelectionSpec("antidiagonal", 42, 2, "float32", 0.2, 5, 24, 8, sinks=1, recent=2, mass=0.5),
        150,
    ),
    PromptCase(
        "antidiagonal_nan",
        PromptSelectionSpec("antidiagonal", 6, 1, "float16", 0.4, 2, 48, 16, sinks=0, recent=0),
        250,
        poison=True,
    ),
    PromptCase(
        "antidiagonal_of_any_width",
        PromptSelectionSpec("antidiagonal", 64, 2, "bfloat16", 0.125, 0, 32, 8, mass=0.6),
        270,
    ),
    PromptCase("prompt_mean", PromptSelectionSpec("mean", 64, 3, "bfloat16", 0.125, 3, 16), 123),
    PromptCase(
        "prompt_mean_mass",
        PromptSelectionSpec("mean", 123, 1, "float16", 2.0, 4, 32, mass=0.8, recent=0),
        200,
        poison=True,
    ),
    PromptCase(
        "antidiagonal_softcap",
        PromptSelectionSpec("antidiagonal", 42, 2, "float32", 0.6, 5, 24, 8, mass=0.7, softcap=1.5),
        150,
        poison=True,
    ),
    PromptCase(
        "prompt_mean_softcap", PromptSelectionSpec("mean", 64, 2, "bfloat16", 1.0, 4, 16, mass=0.7, softcap=0.4), 123
    ),
    PromptCase("prompt_of_one", PromptSelectionSpec("mean", 64, 2, "float32", 0.125, 5, 64), 1),
]


def run_summary_case(case: SummaryCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device``: None when every bit is the reference's."""
    spec, length = case.spec, sum(case.steps)
    generator = torch.Generator().manual_seed(0)
    k = (torch.randn(2, length, 3, spec.head_dim, generator=generator) + 1).to(DTYPES[spec.dtype]).transpose(1, 2)
    k[1, :, : case.padding] = torch.nan
    first, channels = torch.tensor([0, case.padding]), _channels(spec, 2, 3, generator)
    results = []
    for where in (torch.device("cpu"), device):
        # A view into more slots than are used, all of them NaN.
        kept, sums = selection_reference.allocate(spec, 2, 3, length + 3 * spec.block, where)
        kept, sums = kept.fill_(torch.nan)[:, :, :-1], sums.fill_(torch.nan)
        run = summary.summarise(spec) if results else lambda *args: selection_reference.summarise(spec, *args)
        moved = [None if x is None else x.to(where) for x in (k, first, channels)]
        at = 0
        for n in case.steps:
            run(moved[0][:, :, at : at + n], kept, sums, torch.tensor([0, at, at]), *moved[1:])
            at += n
        results.append((kept.cpu(), sums.cpu()))
    (expected, expected_sums), (got, sums) = results
    for b, low in enumerate((0, case.padding // spec.block)):
        rows = slice(low, -(-length // spec.block))
        if not torch.equal(got[b, :, rows], expected[b, :, rows]):
            return f"row {b}: {got[b, :, rows]} instead of {expected[b, :, rows]}"
    if not got[:, :, -(-length // spec.block) :].isnan().all():
        return "rows beyond the last token were written"
    return None if torch.equal(sums, expected_sums) else f"sums {sums} instead of {expected_sums}"


def run_selection_case(case: SelectionCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device``: None when scores are close, and the choice by them is exact."""
    spec, generator = case.spec, torch.Generator().manual_seed(0)
    dim = spec.summary.head_dim

    def numbers(*shape: int) -> Tensor:
        if case.whole:
            return torch.randint(-3, 4, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    q = numbers(2, case.queries, 2 * spec.group, dim).to(DTYPES[spec.dtype]).transpose(1, 2)
    k = numbers(2, 2, case.length, dim).to(DTYPES[spec.summary.dtype])
    first = torch.tensor([0, case.length // 3])
    channels = _channels(spec.summary, 2, 2, generator)
    kept, sums = selection_reference.allocate(spec.summary, 2, 2, case.length + 40, torch.device("cpu"))
    kept.fill_(torch.nan)
    selection_reference.summarise(spec.summary, k, kept, sums, torch.zeros(3, dtype=torch.int64), first, channels)
    lens = torch.tensor([case.start, case.length, case.length])
    args = (q, kept, lens, first if case.padded else None, channels)
    moved = tuple(x.to(device) if x is not None and x is not lens else x for x in args)
    scores = selection.scores(spec)(*moved).cpu()
    if error := _scores_differ(scores, selection_reference.scores(spec, *args)):
        return error
    begin = (first if case.padded else torch.full((2,), case.start)) // spec.block
    end = torch.full((2, 1), -(-case.length // spec.block))
    expected = selection_reference.choose(spec, scores, begin[:, None], end)
    if case.whole and not torch.equal(expected, selection_reference.select(spec, *args)):
        return "the scores order the blocks in another way"
    for changes in selection.configs(spec) if case.choices else ((),):
        got = selection.select(spec, **dict(changes))(*moved).cpu()
        if not torch.equal(got, expected):
            return f"chose {got.tolist()} instead of {expected.tolist()} with {dict(changes)}"
    return None


def run_prompt_case(case: PromptCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device``: None when scores are close, and the choice by them is exact."""
    spec, generator = case.spec, torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, case.tokens, n, spec.head_dim, generator=generator).mul(2).to(DTYPES[spec.dtype]).transpose(1, 2)
        for n in (spec.group, 1)
    )
    first = torch.tensor([0, case.tokens * 2 // 5])
    for x in (q, k):
        x[1, :, : int(first[1])] = torch.nan
    if case.poison:
        k[0, 0, case.tokens // 2, 0] = torch.nan
    moved = [x.to(device) for x in (q, k, first)]
    scores = prompt_selection.prompt_scores(spec)(*moved).cpu()
    if error := _scores_differ(scores, selection_reference.prompt_scores(spec, q, k, first)):
        return error
    blocks = torch.arange(scores.shape[-1])
    begin = (first // spec.block)[:, None, None]
    expected = selection_reference.choose(spec, scores, begin, (blocks + 1)[None, None])
    got = prompt_selection.select_prompt(spec)(*moved).cpu()
    return None if torch.equal(got, expected) else f"chose {got.tolist()} instead of {expected.tolist()}"


def _scores_differ(got: Tensor, expected: Tensor) -> str | None:
    finite = expected.isfinite()
    if not torch.equal(got.where(~finite, 0), expected.where(~finite, 0)):
        return f"scores that are not finite differ: {got} instead of {expected}"
    if not finite.any():
        return None
    difference = (got - expected)[finite].abs().max().item()
    scale = max(1.0, expected[finite].abs().max().item())
    return None if difference <= TOLERANCE * scale else f"scores differ by {difference} of {scale}"


def _channels(spec: SummarySpec, batch: int, heads: int, generator: torch.Generator) -> Tensor | None:
    if spec.kind != "channels":
        return None
    order = torch.rand(batch, heads, spec.head_dim, generator=generator).argsort(-1)
    return order[..., : spec.channels].int().contiguous()
