"""The kernels built for 256-bit vectors, as machines without AVX-512 build them, pass the tests of the wide build."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torchaccel.kernels import candidates, cpp, fused_reference, registry
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.cpp import fused
from torchaccel.kernels.selection_spec import SelectionSpec
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec

from tests.kernels import (
    test_cpp_append,
    test_cpp_linear,
    test_mixed_precision,
    test_rotary,
    test_selection,
    test_selection_prompt,
    test_selection_summary,
    test_shared_prefix,
)
from tests.kernels.fused_cases import CASES, tensors
from torchaccel.tuning.check import check

CPU = torch.device("cpu")
MISSING = toolchain.missing_toolchain()


def forget() -> None:
    """Drop everything compiled that this process remembers; the files of Inductor's cache stay."""
    modules = [import_module(f"{cpp.__name__}.{found.name}") for found in iter_modules(cpp.__path__)]
    for module in (*modules, candidates, registry):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture(autouse=True)
def avx2() -> Iterator[None]:
    if MISSING is not None:
        pytest.skip(MISSING)
    forget()
    with config.patch({"cpp.simdlen": 256}):
        assert pick_vec_isa().bit_width() == 256
        yield
    forget()


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 6), ("bfloat16", 3), ("float16", 1)])
def test_few_row_linear(dtype: str, rows: int) -> None:
    test_cpp_linear.test_matches_the_reference(dtype, rows, 777)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (LinearSpec("bfloat16", 1, True), {"M": 1, "K": 123, "N": 42}),
        (LinearSpec("float32", 6, False), {"M": 8, "K": 642, "N": 123}),
        (test_selection.SPECS["bounds_bf16"], {"B": 2, "H_kv": 3, "Q": 1, "S": 1230}),
        (test_selection.SPECS["labels_f32_mean"], {"B": 1, "H_kv": 2, "Q": 2, "S": 642}),
    ],
    ids=["linear_bf16", "linear_f32", "selection_bf16", "selection_f32"],
)
def test_every_choice_of_a_kernel(spec: LinearSpec | SelectionSpec, shape: dict[str, int]) -> None:
    for candidate in candidates.candidates(spec, "cpu")[1:-1]:
        check(spec, candidates.build(spec, candidate), shape, CPU, 7)


@pytest.mark.parametrize("choice", [{"streams": 1}, {"threads": "all"}], ids=["streams", "threads"])
def test_choices_of_fused_programs(choice: dict[str, Any]) -> None:
    spec = CASES["layer_norm_mlp"]("float32", 3)
    given = tensors(spec)
    for mine, theirs in zip(fused.fused(spec, **choice)(given), fused_reference.fused(spec, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("name", ["bounds_f32_pool", "bounds_f16", "bounds_mixed", "labels_f32_mean"])
def test_block_selection(name: str) -> None:
    test_selection.test_choice_is_that_of_the_reference(name, 530, 3)


@pytest.mark.parametrize("name", list(test_selection_prompt.SPECS)[:2])
def test_prompt_selection(name: str) -> None:
    spec = test_selection_prompt.SPECS[name]
    q, k, first = test_selection_prompt.prompt(spec, 321)
    run = registry.select_prompt(spec, "cpu").run
    expected = test_selection_prompt.selection_reference.select_prompt(spec, q, k, first)
    assert torch.equal(run(q, k, first), expected)


@pytest.mark.parametrize("name", ["minmax", "mean", "channels"])
def test_summaries(name: str) -> None:
    spec = next(spec for spec in test_selection_summary.SPECS.values() if spec.kind == name)
    torch.manual_seed(6)
    k = torch.randn(2, 3, 123, spec.head_dim).to(test_selection_summary.DTYPES[spec.dtype])
    channels = test_selection_summary.chosen_channels(spec, 2, 3)
    got, want = (test_selection_summary.poisoned(spec, 2, 3, 200) for _ in range(2))
    run = registry.summarise(spec, "cpu").run
    test_selection_summary.store(lambda _, *args: run(*args), spec, k, *got, (42, 6), None, channels)
    reference = test_selection_summary.selection_reference.summarise
    test_selection_summary.store(reference, spec, k, *want, (42, 6), None, channels)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", test_cpp_append.FORMATS[:4], ids=lambda fmt: f"{fmt.kind}-{fmt.axis}")
def test_append_of_a_prompt(fmt: KVFormat) -> None:
    test_cpp_append.test_same_bits_as_the_reference(fmt, 50, 123)


@pytest.mark.parametrize("name", list(test_rotary.SPECS)[:4])
def test_rotary_embedding(name: str) -> None:
    for length, new in ((123, 1), (6, 30)):
        test_rotary.test_matches_the_reference(name, length, new)


@pytest.mark.parametrize(
    ("name", "new", "rows", "heads"),
    [("float32_additive", 3, 4, 1), ("bfloat16_bool", 1, 4, 1), ("int8_bool", 1, 1, 1)],
)
def test_shared_prefixes(name: str, new: int, rows: int, heads: int) -> None:
    """Both kernels, and their merge."""
    test_shared_prefix.test_levels_are_concatenated_attention(name, new, rows, heads, "seed")
    test_shared_prefix.test_generated_merge_is_the_reference()


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("bfloat16", 90)])
def test_classes_of_tokens_in_formats_of_their_own(dtype: str, window: int | None) -> None:
    test_mixed_precision.test_classes_attend_as_one_cache(dtype, window)


@pytest.mark.parametrize("index", ["blocks", "tokens"])
def test_lists(index: Any) -> None:
    dense = KVFormat("dense", "bfloat16", 42)
    spec = AttentionSpec("decode", 42, 3, "bfloat16", dense, dense, 42**-0.5, index=index, lse=True, mass=True)
    seed = candidates.candidates(spec, "cpu")[0]
    check(spec, candidates.build(spec, seed), {"B": 2, "H_kv": 2, "Q": 3, "S": 321}, CPU, 6)
