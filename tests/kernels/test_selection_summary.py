"""Summaries of keys: bounds, means and labels, however the tokens arrived."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torchaccel.kernels import selection_reference
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.cpp import summary as cpp
from torchaccel.kernels.selection_spec import SummarySpec
from torchaccel.kernels.spec import DTYPES

CPU = torch.device("cpu")
SPECS = {
    "bounds_bf16": SummarySpec("minmax", 64, "bfloat16", "bfloat16", 16),
    "bounds_odd_f32": SummarySpec("minmax", 123, "float32", "float32", 32),
    "mean_bf16": SummarySpec("mean", 64, "bfloat16", "bfloat16", 64),
    "mean_f16_f32": SummarySpec("mean", 42, "float16", "float32", 16),
    "mean_narrowed": SummarySpec("mean", 6, "float32", "float16", 128),
    "channels": SummarySpec("channels", 64, "bfloat16", "bfloat16", 1, 5),
}
needs_compiler = pytest.mark.skipif(
    toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain())
)


def poisoned(spec: SummarySpec, batch: int, heads: int, capacity: int) -> tuple[Tensor, Tensor]:
    """A summary and sums that are NaN throughout."""
    summary, sums = selection_reference.allocate(spec, batch, heads, capacity, CPU)
    return summary.fill_(torch.nan), sums.fill_(torch.nan)


def chosen_channels(spec: SummarySpec, batch: int, heads: int) -> Tensor | None:
    if spec.kind != "channels":
        return None
    return torch.rand(batch, heads, spec.head_dim).argsort(-1)[..., : spec.channels].int().contiguous()


def store(
    summarise: Callable[..., None],
    spec: SummarySpec,
    k: Tensor,
    summary: Tensor,
    sums: Tensor,
    steps: tuple[int, ...] = (),
    first: Tensor | None = None,
    channels: Tensor | None = None,
) -> None:
    """Summarise the keys ``k`` in steps of the given numbers of tokens, then what is left at once."""
    at = 0
    for n in (*steps, k.shape[2] - sum(steps)):
        summarise(spec, k[:, :, at : at + n], summary, sums, torch.tensor([0, at, at]), first, channels)
        at += n


def compiled(spec: SummarySpec, *args: object) -> None:
    cpp.summarise(spec)(*args)


IMPLEMENTATIONS = [selection_reference.summarise, pytest.param(compiled, marks=needs_compiler)]


def live_rows(spec: SummarySpec, summary: Tensor, length: int, first: Tensor) -> list[Tensor]:
    return [row[:, int(f) // spec.block : -(-length // spec.block)] for row, f in zip(summary, first, strict=True)]


@pytest.mark.parametrize("summarise", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SPECS)
def test_what_is_kept(name: str, summarise: Callable[..., None]) -> None:
    """Against the definition, row by row, with left padding that holds NaN."""
    spec, length = SPECS[name], 333
    torch.manual_seed(1)
    k = (torch.randn(2, length, 3, spec.head_dim) + 1).to(DTYPES[spec.dtype]).transpose(1, 2)
    first = torch.tensor([0, 150])
    k[1, :, :150] = torch.nan
    channels = chosen_channels(spec, 2, 3)
    summary, sums = poisoned(spec, 2, 3, 400)
    store(summarise, spec, k, summary, sums, (200, 1, 1, 30), first, channels)
    for b in range(2):
        for h in range(3):
            for row in range(int(first[b]) // spec.block, -(-length // spec.block)):
                keys = k[b, h, max(int(first[b]), row * spec.block) : (row + 1) * spec.block].float()
                if spec.kind == "minmax":
                    expected = torch.stack([keys.amin(0), keys.amax(0)])
                elif spec.kind == "mean":
                    expected = keys.mean(0)
                else:
                    assert channels is not None
                    expected = keys[0, channels[b, h].long()]
                # One rounding of a mean to what is stored; everything else is a copy.
                atol = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[summary.dtype]
                exact = spec.kind != "mean"
                torch.testing.assert_close(summary[b, h, row].float(), expected, atol=0 if exact else atol, rtol=0)
    if spec.kind == "minmax":
        assert summary[:, :, -(-length // spec.block) :].isnan().all()


@needs_compiler
@pytest.mark.parametrize("steps", [(), (1,) * 40, (100, 28, 128, 1, 200), (499,)])
@pytest.mark.parametrize("name", SPECS)
def test_same_bits_however_the_tokens_arrive(name: str, steps: tuple[int, ...]) -> None:
    spec = SPECS[name]
    torch.manual_seed(len(steps))
    k = torch.randn(2, 3, spec.head_dim, 500).to(DTYPES[spec.dtype]).transpose(2, 3)
    first = torch.tensor([0, 37])
    channels = chosen_channels(spec, 2, 3)
    ours, theirs = poisoned(spec, 2, 3, 512), poisoned(spec, 2, 3, 512)
    store(compiled, spec, k, *ours, steps, first, channels)
    store(selection_reference.summarise, spec, k, *theirs, (), first, channels)
    for a, b in zip(live_rows(spec, ours[0], 500, first), live_rows(spec, theirs[0], 500, first), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("summarise", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["bounds_bf16", "mean_bf16"])
def test_rewind_by_the_keys_of_the_open_block(name: str, summarise: Callable[..., None]) -> None:
    spec = SPECS[name]
    torch.manual_seed(3)
    k, other = torch.randn(2, 1, 2, 300, 64).bfloat16().unbind(0)
    want, got = poisoned(spec, 1, 2, 300), poisoned(spec, 1, 2, 300)
    again = torch.cat([k[:, :, :200], other[:, :, 200:]], 2)
    store(summarise, spec, again, *want)
    store(summarise, spec, k, *got)
    begin = 200 // spec.block * spec.block
    summarise(spec, k[:, :, begin:200], *got, torch.tensor([0, begin, begin]), None, None)
    summarise(spec, other[:, :, 200:], *got, torch.tensor([0, 200, 200]), None, None)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@needs_compiler
def test_threads_and_avx2() -> None:
    for spec in SPECS.values():
        torch.manual_seed(0)
        k = torch.randn(1, 2, 5000, spec.head_dim).to(DTYPES[spec.dtype])
        channels = chosen_channels(spec, 1, 2)
        want = poisoned(spec, 1, 2, 5000)
        store(selection_reference.summarise, spec, k, *want, (1000,), None, channels)
        with config.patch({"cpp.simdlen": 256}), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpp, "compile_source", toolchain.compile_source.__wrapped__)
            narrow = cpp.summarise.__wrapped__(spec)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            for run in (cpp.summarise(spec), narrow):
                got = poisoned(spec, 1, 2, 5000)
                store(lambda _, *args, run=run: run(*args), spec, k, *got, (1000,), None, channels)
                assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        finally:
            torch.set_num_threads(threads)


@needs_compiler
def test_errors_say_what_was_found() -> None:
    spec = SPECS["mean_bf16"]
    summary, sums = poisoned(spec, 1, 1, 64)
    k, lens = torch.zeros(1, 1, 65, 64).bfloat16(), torch.tensor([0, 0, 0])
    for summarise in (selection_reference.summarise, compiled):
        with pytest.raises((ValueError, RuntimeError), match="has 1 rows, but 2"):
            summarise(spec, k, summary, sums, lens, None, None)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 with rows"):
        compiled(spec, k, summary.float(), sums, lens)
    with pytest.raises(ValueError, match="contiguous int32"):
        compiled(SPECS["channels"], k, *poisoned(SPECS["channels"], 1, 1, 65), lens)
    assert "head dims up to 256; found 300" in (cpp.supports(SummarySpec("mean", 300, "float32", "float32")) or "")
    assert "1024 slots; found 2048" in (cpp.supports(SummarySpec("mean", 64, "float32", "float32", 2048)) or "")
