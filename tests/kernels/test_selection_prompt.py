"""Which blocks a prompt reads: the reference against the papers, the C++ against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torchaccel.kernels import ops, selection_reference
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.cpp import prompt_selection
from torchaccel.kernels.selection_spec import PromptSelectionSpec
from torchaccel.kernels.spec import DTYPES

SPECS = {
    "antidiagonal_bf16": PromptSelectionSpec("antidiagonal", 64, 3, "bfloat16", 0.125, 5),
    "antidiagonal_f32_mass": PromptSelectionSpec(
        "antidiagonal", 42, 2, "float32", 0.2, 30, 32, 8, sinks=2, recent=2, mass=0.7
    ),
    "antidiagonal_odd_bf16": PromptSelectionSpec("antidiagonal", 123, 1, "bfloat16", 0.1, 6, 128, 8),
    "antidiagonal_f16": PromptSelectionSpec("antidiagonal", 6, 4, "float16", 0.4, 4, 48, 16, sinks=0, recent=0),
    "antidiagonal_any_width": PromptSelectionSpec("antidiagonal", 64, 3, "bfloat16", 0.125, 0, mass=0.6),
    "mean_bf16": PromptSelectionSpec("mean", 64, 3, "bfloat16", 0.125, 5, 64),
    "mean_f16_mass": PromptSelectionSpec("mean", 123, 2, "float16", 2.0, 12, 16, mass=0.8),
    "antidiagonal_softcap": PromptSelectionSpec("antidiagonal", 42, 2, "float32", 0.6, 0, mass=0.7, softcap=1.5),
    "mean_softcap": PromptSelectionSpec("mean", 6, 2, "bfloat16", 1.0, 9, 16, mass=0.7, softcap=0.4),
    "mean_f32": PromptSelectionSpec("mean", 256, 1, "float32", 0.06, 3, 128, recent=0),
}
needs_compiler = pytest.mark.skipif(
    toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain())
)


def prompt(spec: PromptSelectionSpec, tokens: int, batch: int = 2, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed q and k as models pass them, and left padding that holds NaN."""
    torch.manual_seed(tokens)
    q, k = (
        torch.randn(batch, tokens, n, spec.head_dim).mul(2).to(DTYPES[spec.dtype]).transpose(1, 2)
        for n in (heads * spec.group, heads)
    )
    first = torch.arange(batch) * (tokens * 2 // 5)
    for b in range(batch):
        q[b, :, : int(first[b])] = torch.nan
        k[b, :, : int(first[b])] = torch.nan
    return q, k, first


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 63, 128, 1000])
@pytest.mark.parametrize("name", SPECS)
def test_choice_and_scores_are_those_of_the_reference(name: str, tokens: int) -> None:
    spec = SPECS[name]
    args = prompt(spec, tokens)
    assert torch.equal(prompt_selection.select_prompt(spec)(*args), selection_reference.select_prompt(spec, *args))
    expected = selection_reference.prompt_scores(spec, *args)
    got = prompt_selection.prompt_scores(spec)(*args)
    seen = expected.isfinite()
    assert torch.equal(seen, got.isfinite())
    # Probabilities, summed over up to 16 rows, and products: another order of summation.
    scale = max(1.0, expected[seen].abs().max().item())
    torch.testing.assert_close(got[seen], expected[seen], rtol=0, atol=3e-6 * scale)


@needs_compiler
def test_any_strides_threads_and_avx2() -> None:
    for name in ("antidiagonal_bf16", "mean_f16_mass"):
        spec = SPECS[name]
        q, k, first = prompt(spec, 700)
        expected = selection_reference.select_prompt(spec, q, k, first)
        across = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k)]
        with config.patch({"cpp.simdlen": 256}), pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompt_selection, "compile_source", toolchain.compile_source.__wrapped__)
            narrow = prompt_selection.select_prompt.__wrapped__(spec)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(prompt_selection.select_prompt(spec)(*across, first), expected)
            assert torch.equal(narrow(q, k, first), expected)
        finally:
            torch.set_num_threads(threads)


def implementations(spec: PromptSelectionSpec) -> list:
    made = [lambda *args: selection_reference.select_prompt(spec, *args)]
    return made if prompt_selection.supports(spec) else [*made, prompt_selection.select_prompt(spec)]


def test_xattention_example() -> None:
    """Eight tokens, stride 2, blocks of 4: the masses worked out by hand."""
    spec = PromptSelectionSpec("antidiagonal", 2, 1, "float32", 2**-0.5, 2, 4, 2)
    q = [(1, 0), (0, 1), (1, 1), (1, -1), (0, 2), (2, 0), (1, 0), (0, 1)]
    k = [(1, 0), (1, 1), (0, 1), (2, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    args = [torch.tensor(x).float()[None, None] for x in (q, k)]
    mass = selection_reference.prompt_scores(spec, *args)
    torch.testing.assert_close(mass[0, 0], torch.tensor([[2, 0], [1.3918, 0.6082]]), atol=1e-4, rtol=0)
    for select in implementations(spec):
        assert select(*args).tolist() == [[[[0, -1], [0, 1]]]]


@pytest.mark.parametrize("estimate", ["antidiagonal", "mean"])
def test_a_strong_block_is_found_and_nothing_above_the_diagonal(estimate: str) -> None:
    spec = PromptSelectionSpec(estimate, 32, 1, "float32", 0.2, 3, 32, 8)  # type: ignore[arg-type]
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 320, 32) * 0.1 for _ in range(2))
    q[:, :, 6 * 32 :] += 2
    k[:, :, 3 * 32 : 4 * 32] += 2
    for select in implementations(spec):
        index = select(q, k)[0, 0].tolist()
        assert index[0] == [0, -1, -1] and index[1] == [0, 1, -1]
        assert [row[:3] for row in index[6:]] == [[0, 3, i] for i in range(6, 10)]
        assert all(max(row) == i for i, row in enumerate(index))


@pytest.mark.parametrize("name", ["antidiagonal_bf16", "mean_bf16"])
def test_enough_width_is_causal_attention(name: str) -> None:
    spec = replace(SPECS[name], width=20)
    q, k, first = prompt(spec, 500)
    for select in implementations(spec):
        index = select(q, k, first)
        for b in range(2):
            begin = int(first[b]) // 64
            for block in range(8):
                expected = [*range(begin, block + 1), *[-1] * 20][:20]
                assert (index[b, :, block] == torch.tensor(expected)).all()


@pytest.mark.parametrize("name", ["antidiagonal_f32_mass", "mean_f16_mass"])
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    spec = SPECS[name]
    q, k, _ = prompt(spec, 640, batch=1)
    later = torch.arange(640)[:, None] >= 320
    for select in implementations(spec):
        changed = select(*(torch.where(later, x.flip(2) * 3, x) for x in (q, k)))
        assert torch.equal(select(q, k)[:, :, : 320 // spec.block], changed[:, :, : 320 // spec.block])
        assert not torch.equal(select(q, k), changed)


@pytest.mark.parametrize("name", ["antidiagonal_bf16", "mean_bf16"])
def test_a_padded_row_is_chosen_as_when_alone(name: str) -> None:
    spec = SPECS[name]
    q, k, _ = prompt(spec, 600, batch=1)
    padding = torch.full((1, 1, 128, 64), torch.nan).bfloat16()
    both = [torch.cat([padding.expand(-1, x.shape[1], -1, -1), x], 2) for x in (q, k)]
    for select in implementations(spec):
        shifted = select(*both, torch.tensor([128]))
        assert (shifted[:, :, :2] == -1).all()
        assert torch.equal(torch.where(shifted < 0, shifted, shifted - 2)[:, :, 2:], select(q, k))


def test_operator() -> None:
    ops.library()
    spec = SPECS["mean_bf16"]
    q, k, first = prompt(spec, 200)
    torch.library.opcheck(torch.ops.torchaccel.select_prompt_blocks.default, (q, k, first, spec.key()))
    got = torch.ops.torchaccel.select_prompt_blocks(q, k, first, spec.key())
    assert torch.equal(got, selection_reference.select_prompt(spec, q, k, first))


@needs_compiler
def test_errors_say_what_was_found() -> None:
    spec = SPECS["mean_bf16"]
    q, k, first = prompt(spec, 100)
    with pytest.raises(ValueError, match="100 queries and 99 keys"):
        prompt_selection.select_prompt(spec)(q, k[:, :, 1:], first)
    with pytest.raises(ValueError, match="no whole number of strides of 48"):
        replace(spec, stride=48)
    assert "found 300" in (prompt_selection.supports(replace(spec, head_dim=300)) or "")
    with pytest.raises(ValueError, match="found float64"):
        prompt_selection.select_prompt(replace(spec, dtype="float64"))
    assert all(PromptSelectionSpec.from_key(spec.key()) == spec for spec in SPECS.values())
