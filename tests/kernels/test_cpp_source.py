"""Generated C++ source: golden files, determinism, narrow vector units, and machines without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torchaccel.kernels import reference
from torchaccel.kernels.cpp import (
    append,
    attention,
    gather_tokens,
    linear,
    prompt_selection,
    selection,
    sparse_mlp,
    summary,
    threshold_linear,
    window_prefill,
)
from torchaccel.kernels.cpp import compile as toolchain
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import LinearSpec

from tests.kernels.cpp_support.cases import SPECS, assert_same, inputs
from tests.kernels.gather_cases import SPEC as GATHER_SPEC
from tests.kernels.test_cpp_formats import DECODE
from tests.kernels.test_cpp_prefill import SPECS as PREFILL_SPECS
from tests.kernels.test_selection import SPECS as SELECTION_SPECS
from tests.kernels.test_selection_prompt import SPECS as PROMPT_SELECTION_SPECS

GOLDEN = Path(__file__).parents[1] / "golden" / "cpp"
SOURCES = {
    "decode_f32": lambda: attention.source(SPECS["f32"]),
    "decode_bf16_bool": lambda: attention.source(SPECS["bf16_bool"]),
    "decode_f32_int8_positions_additive": lambda: attention.source(SPECS["f32_int8_positions_additive"]),
    "decode_bf16_bool_rotary": lambda: attention.source(replace(SPECS["bf16_bool"], rotary="half", rotary_dim=64)),
    "decode_bf16_gear2": lambda: attention.source(DECODE["gear2"]),
    "prefill_bf16_window": lambda: window_prefill.source(PREFILL_SPECS["bf16_window"]),
    "linear_bf16_3": lambda: linear.source(LinearSpec("bfloat16", 1, False), 3),
    "sparse_mlp_bf16": lambda: sparse_mlp.source(SparseMlpSpec("bfloat16", 1, "silu")),
    "threshold_linear_f16_2": lambda: threshold_linear.source(ThresholdLinearSpec("float16", 8, True), 2),
    "gather_tokens": lambda: gather_tokens.source(GATHER_SPEC),
    "append_int8_keys": lambda: append.source(SPECS["bf16_int8_bool"].key_format),
    "summary_bounds_bf16": lambda: summary.source(SELECTION_SPECS["bounds_bf16"].summary),
    "summary_mean_bf16": lambda: summary.source(SELECTION_SPECS["mean_bf16_softmax"].summary),
    "selection_bounds_bf16": lambda: selection.source(SELECTION_SPECS["bounds_bf16"]),
    "selection_antidiagonal_bf16": lambda: prompt_selection.source(PROMPT_SELECTION_SPECS["antidiagonal_bf16"]),
    "selection_mean_softmax_mass": lambda: selection.source(SELECTION_SPECS["mean_bf16_softmax"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_golden_source(name: str) -> None:
    """``TORCHACCEL_UPDATE_GOLDEN=1`` rewrites the files after a deliberate change."""
    path = GOLDEN / f"{name}.cpp.expected"
    text = SOURCES[name]()
    if os.environ.get("TORCHACCEL_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_plain_and_carries_no_path(name: str) -> None:
    text = SOURCES[name]()
    assert "{{ " not in text and "{% " not in text and "{# " not in text
    assert str(Path.home()) not in text and "site-packages" not in text
    assert "Spec: " in text or "Format: " in text


def test_the_same_spec_gives_the_same_text_in_another_process() -> None:
    code = (
        "from torchaccel.kernels.spec import AttentionSpec; from torchaccel.kernels.cpp import attention; import sys; "
        "sys.stdout.write(attention.source(AttentionSpec.from_key(sys.argv[1])))"
    )
    spec = SPECS["f32_window_bool"]
    done = subprocess.run([sys.executable, "-c", code, spec.key()], capture_output=True, text=True, check=True)
    assert done.stdout == attention.source(spec)


@pytest.mark.skipif(toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain()))
@pytest.mark.parametrize("name", ["codes", "codebook_and_gear"])
def test_avx2(name: str) -> None:
    """The same source built for 256-bit vectors."""
    spec = SPECS["bf16_int8_bool"]
    if name == "codebook_and_gear":
        keys, values = DECODE["codebook4"].key_format, DECODE["gear2"].value_format
        spec = replace(spec, head_dim=64, group=3, key_format=keys, value_format=values, scale=0.125)
    case = inputs(spec, batch=2, length=200)
    case.mask = torch.rand(2, 1, 1, 201) > 0.3
    with config.patch({"cpp.simdlen": 256}):
        narrow = _build_again(attention, attention.decode_attention, case.spec)
    assert_same(case, case.run(narrow), case.expected(), 201)


@pytest.mark.skipif(toolchain.missing_toolchain() is not None, reason=str(toolchain.missing_toolchain()))
def test_avx2_prefill_and_linear() -> None:
    torch.manual_seed(0)
    spec = PREFILL_SPECS["bf16_window"]
    q, k, v = (torch.randn(1, heads, 150, 64).bfloat16() for heads in (6, 2, 2))
    x, w = torch.randn(1, 300).bfloat16(), torch.randn(50, 300).bfloat16()
    with config.patch({"cpp.simdlen": 256}):
        prefill = _build_again(window_prefill, window_prefill.prefill_attention, spec)
        kernel = toolchain.compile_source.__wrapped__(linear.source(LinearSpec("bfloat16", 1, False), 1))
    expected = reference.prefill_attention(spec, q, k, v, None)
    torch.testing.assert_close(prefill(q, k, v, None).float(), expected.float(), atol=2e-2, rtol=2e-2)
    y = torch.empty(1, 50).bfloat16()
    kernel(x.data_ptr(), *x.stride(), 1, 300, w.data_ptr(), 0, y.data_ptr(), 50)
    torch.testing.assert_close(y, reference.linear(x, [w], [None])[0], atol=0.2, rtol=8e-3)


def _build_again(module, factory, spec):  # type: ignore[no-untyped-def]
    """``factory(spec)`` with nothing taken from this process's caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_source", toolchain.compile_source.__wrapped__)
        return factory.__wrapped__(spec)


def test_without_a_compiler_kernels_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    toolchain.missing_toolchain.cache_clear()
    try:
        assert "install g++" in (attention.supports(SPECS["f32"]) or "")
        assert "install g++" in (linear.supports(LinearSpec("bfloat16", 1, False)) or "")
    finally:
        monkeypatch.undo()
        toolchain.missing_toolchain.cache_clear()


def test_a_wrong_number_of_arguments_is_an_error() -> None:
    if toolchain.missing_toolchain() is None:
        kernel = toolchain.compile_source(attention.source(SPECS["f32"]))
        with pytest.raises(TypeError, match="integers, got 2"):
            kernel(1, 2)
