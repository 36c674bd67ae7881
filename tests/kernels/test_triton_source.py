"""Generated source: golden files, determinism, the cache directory, launch choices, and what is declined."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torchaccel.kernels import codebook, kv_format, registry
from torchaccel.kernels.selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import AttentionSpec, LinearSpec
from torchaccel.kernels.triton import (
    decode_attention,
    decode_source,
    fused,
    gather_tokens,
    linear,
    merge,
    prompt_selection,
    selection,
    source,
    sparse_mlp,
    summary,
    threshold_linear,
    tiles,
    window_prefill,
)
from torchaccel.kernels.triton.codebook_polynomial import table_polynomial

from tests.kernels.fused_cases import between_attentions, packed_heads
from tests.kernels.gather_cases import SPEC as GATHER_SPEC
from tests.kernels.triton_support.decode_cases import DecodeCase
from tests.kernels.triton_support.fused_cases import add_norm
from tests.kernels.triton_support.prefill_cases import PrefillCase

GOLDEN = Path(__file__).parents[1] / "golden" / "triton"
DENSE = DecodeCase("dense").spec()
INT8 = DecodeCase("int8", keys="int8", values="int8").spec()
INT4 = DecodeCase("int4", keys="int4", values="int2", key_group=32, tail=64).spec()
GEAR = DecodeCase("gear", keys="int2", values="int4", key_rank=2, value_rank=4, value_outliers=2, tail=64).spec()
TURBO = DecodeCase("turbo", keys="int4", values="int2", key_axis="token", codebook="gaussian", value_group=32).spec()
LATENT = DecodeCase("latent", keys="latent", key_rank=16, tail=64, head_dim=80).spec()
WINDOW = PrefillCase("window").spec()
BOUNDS = SelectionSpec(
    SummarySpec("minmax", 80, "bfloat16", "bfloat16"), 3, "bfloat16", 64, "mean", pool=4, sinks=1, recent=2
)
MASSES = SelectionSpec(SummarySpec("mean", 64, "float16", "float32"), 4, "float16", 64, "softmax", 0.125, mass=0.9)
LABELS = SelectionSpec(SummarySpec("channels", 128, "bfloat16", "bfloat16", 1, 20), 4, "bfloat16", 512, recent=64)
ANTIDIAGONAL = PromptSelectionSpec("antidiagonal", 80, 4, "bfloat16", 0.125, 32, 192, 16, mass=0.9)
SOURCES = {
    "decode_dense": lambda: decode_source.generate(DENSE),
    "decode_static_bool_mask": lambda: decode_source.generate(replace(DENSE, mask="bool", causal=False), False),
    "decode_int8_positions": lambda: decode_source.generate(replace(INT8, positions=True)),
    "decode_int4_int2_blocks_mass": lambda: decode_source.generate(replace(INT4, index="blocks", mass=True), False),
    "decode_stream_tokens_lse": lambda: decode_source.generate(replace(DENSE, index="tokens", lse=True), True, True),
    "decode_window_sinks_additive_softcap": lambda: decode_source.generate(
        replace(DENSE, window=1024, sinks=4, mask="additive", softcap=30.0, head_dim=80)
    ),
    "decode_int8_rotary": lambda: decode_source.generate(replace(INT8, rotary="half", rotary_dim=24)),
    "decode_int2_int4_corrected": lambda: decode_source.generate(GEAR),
    "decode_corrected_tokens": lambda: decode_source.generate(replace(GEAR, index="tokens"), False, True),
    "decode_gaussian_codebooks": lambda: decode_source.generate(TURBO),
    "decode_latent_positions": lambda: decode_source.generate(replace(LATENT, positions=True)),
    "merge_three": lambda: merge.generate(3, 80),
    "prefill_window_sinks": lambda: window_prefill.generate(WINDOW),
    "prefill_blocks_lse_mass": lambda: window_prefill.generate(
        replace(WINDOW, window=None, index="blocks", lse=True, mass=True)
    ),
    "summary_bounds": lambda: summary.generate(BOUNDS.summary),
    "summary_mean": lambda: summary.generate(MASSES.summary),
    "summary_channels": lambda: summary.generate(LABELS.summary),
    "selection_bounds_mean_pool": lambda: selection.generate(BOUNDS),
    "selection_mean_softmax_mass": lambda: selection.generate(MASSES),
    "selection_channels": lambda: selection.generate(LABELS),
    "prompt_antidiagonal_mass": lambda: prompt_selection.generate(ANTIDIAGONAL),
    "prompt_mean": lambda: prompt_selection.generate(replace(ANTIDIAGONAL, estimate="mean", mass=1.0)),
    "fused_between_attentions": lambda: fused.generate(between_attentions("bfloat16", 1)),
    "fused_packed_heads": lambda: fused.generate(packed_heads("float16", 2)),
    "fused_add_norm": lambda: fused.generate(add_norm("bfloat16", 4096)),
    "sparse_mlp": lambda: sparse_mlp.generate(SparseMlpSpec("bfloat16", 4, "silu")),
    "threshold_linear": lambda: threshold_linear.generate(ThresholdLinearSpec("bfloat16", 4, True)),
    "gather_tokens": lambda: gather_tokens.generate(GATHER_SPEC),
    "prefill_window_sinks_bool_mask": lambda: window_prefill.generate(replace(WINDOW, mask="bool")),
}

# What the registry chooses for a GPU: its function, and a spec.
CHOSEN = [
    ("summarise", BOUNDS.summary),
    ("select", MASSES),
    ("select_prompt", ANTIDIAGONAL),
    ("fused", add_norm("bfloat16", 4096)),
    ("linear", LinearSpec("bfloat16", 4, True)),
    ("sparse_mlp", SparseMlpSpec("bfloat16", 4, "silu")),
    ("threshold_linear", ThresholdLinearSpec("bfloat16", 4, True)),
]


@pytest.mark.parametrize("name", SOURCES)
def test_golden_source(name: str) -> None:
    """``TORCHACCEL_UPDATE_GOLDEN=1`` rewrites the files after a deliberate change."""
    path = GOLDEN / f"{name}.py.expected"
    text = SOURCES[name]()
    if os.environ.get("TORCHACCEL_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_plain_and_carries_its_spec(name: str) -> None:
    text = SOURCES[name]()
    compile(text, name, "exec")
    assert '\nspec: {"' in text or name.startswith(("merge", "fused", "sparse", "threshold", "gather"))
    assert "{%" not in text and "\n\n\n\n" not in text and text.endswith(")\n")
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_source_emits_only_what_the_spec_needs() -> None:
    text = decode_source.generate(DENSE).split("Legend")[1]
    for part in ("mask_c", "positions", "sink", "tl.float16", "complete_block", "tanh"):
        assert part not in text


def test_import_leaves_triton_alone() -> None:
    code = (
        "import sys, torchaccel.kernels.triton.decode_attention, torchaccel.kernels.triton.merge\n"
        "import torchaccel.kernels.triton.window_prefill\n"
        "from tests.kernels.test_triton_source import CHOSEN, registry\n"
        "assert {getattr(registry, name)(spec, 'cuda').name for name, spec in CHOSEN} == {'triton'}\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(("name", "spec"), CHOSEN)
def test_a_gpu_gets_them_and_elsewhere_the_reference_says_why(name: str, spec: object) -> None:
    choose = getattr(registry, name)
    assert choose(spec, "cuda").name == "triton" and choose(spec, "cuda").reason is None
    assert choose(spec, "mps").name == "reference" and "device mps" in choose(spec, "mps").reason
    wrong = replace(spec, dtype="float64")  # type: ignore[type-var]
    assert choose(wrong, "cuda").name == "reference" and "found float64" in choose(wrong, "cuda").reason


def test_a_gpu_merges_parts_with_the_generated_kernel() -> None:
    found = registry.merge("cuda")
    assert isinstance(found, partial) and found.keywords == {"combine": merge.merge}


@pytest.mark.parametrize(
    ("make", "spec", "reason"),
    [
        (summary.summarise, replace(BOUNDS.summary, head_dim=300), "head dims up to 256; found 300"),
        (selection.select, replace(BOUNDS, summary=replace(BOUNDS.summary, stored="float64")), "found float64"),
        (selection.select, replace(BOUNDS, group=33), "up to 32 query heads per KV head; found 33"),
        (prompt_selection.select_prompt, replace(ANTIDIAGONAL, head_dim=300), "found 300"),
        (prompt_selection.select_prompt, replace(ANTIDIAGONAL, block=1040), "up to 64 strides; found 65"),
        (fused.fused, between_attentions("bfloat16", 17), "1 to 16 rows"),
        (linear.linear, LinearSpec("bfloat16", 17, False), "1 to 16 rows"),
        (sparse_mlp.sparse_mlp, SparseMlpSpec("bfloat16", 17, "silu"), "1 to 16 rows"),
        (threshold_linear.threshold_linear, ThresholdLinearSpec("bfloat16", 17, True), "1 to 16 rows"),
    ],
)
def test_other_kernels_decline(make: Callable[..., object], spec: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(spec)


def test_cache_file_is_repaired_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path))
    text = "answer = 42\n"
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: source.write(text, "some_kernel"), range(8)))
    (path,) = paths
    assert path.parent == tmp_path / "triton" and path.read_text() == text
    path.write_text("answer = 4")
    assert source.load(text, "some_kernel").answer == 42
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_unwritable_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="TORCHACCEL_CACHE_DIR"):
        source.write("pass\n", "some_kernel")


# On 132 multiprocessors, by (tokens, programs without splitting).
SPLITS = {
    (1 << 20, 2): 132,
    (1 << 20, 8): 33,
    (1 << 20, 32): 8,
    (1 << 20, 64): 4,
    (1 << 20, 132): 2,
    (1 << 20, 264): 1,
    (1 << 20, 1000): 1,
    (33792, 2): 132,
    (4096, 8): 16,
    (257, 8): 2,
    (256, 8): 1,
    (1, 8): 1,
    (0, 8): 1,
}


@pytest.mark.parametrize(("tokens", "work"), SPLITS)
def test_split_count(tokens: int, work: int) -> None:
    assert tiles.split_count(tokens, 64, work, 132) == SPLITS[tokens, work]


def test_no_split_is_superfluous() -> None:
    for tokens in range(1, 5000, 37):
        splits = tiles.split_count(tokens, 64, 3, 132)
        blocks = math.ceil(tokens / 64)
        assert 1 <= splits <= blocks
        assert splits == 1 or math.ceil(blocks / (splits - 1)) > math.ceil(blocks / splits)


def test_families() -> None:
    found = [tiles.family_of(x) for x in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None)]
    assert found == ["sm_80", "sm_80", "sm_80", "sm_90", "sm_90", "sm_80", "gfx942"]


DECLINED: list[tuple[AttentionSpec, int, str]] = [
    (replace(DENSE, phase="prefill"), 1, "phase"),
    (DENSE, 17, "launch appends 1 to 16"),
    (replace(DENSE, group=9), 16, "query rows"),
    (replace(DENSE, head_dim=300), 1, "head dimensions"),
    (replace(DENSE, key_format=replace(DENSE.key_format, kind="empty")), 1, "empty key format"),
    (replace(DENSE, value_format=replace(DENSE.value_format, dtype="float16")), 1, "dtype"),
    (replace(INT8, key_format=replace(INT8.key_format, block=48)), 1, "power of two tokens"),
    (replace(INT8, key_format=replace(INT8.key_format, group=8)), 1, "multiples of 16"),
    (replace(INT8, value_format=replace(INT8.value_format, group=48)), 1, "groups of channels"),
    (replace(INT8, value_format=replace(INT8.value_format, window=64)), 1, "same block and window"),
    (replace(DENSE, value_format=replace(DENSE.value_format, kind="latent", rank=4)), 1, "values are not"),
    (replace(LATENT, value_format=replace(INT8.value_format, head_dim=80)), 1, "same block and window"),
    (replace(LATENT, key_format=replace(LATENT.key_format, block=48)), 1, "key blocks of a power of two tokens"),
    (
        replace(INT8, key_format=replace(INT8.key_format, rank=17)),
        1,
        "key errors are corrected by factors of rank up to 16",
    ),
    (replace(DENSE, index="blocks", index_block=8), 1, "multiple of 16 slots"),
    (replace(DENSE, softcap=0.0), 1, "softcap"),
    (replace(DENSE, window=0), 1, "window"),
    (replace(DENSE, rotary="half", rotary_dim=66), 1, "an even number of channels is rotated, 2 to 64; found"),
]


@pytest.mark.parametrize(("spec", "new_tokens", "reason"), DECLINED)
def test_decode_declines(spec: AttentionSpec, new_tokens: int, reason: str) -> None:
    assert reason in (decode_attention.supports(spec, new_tokens) or "")
    if new_tokens == 1:
        with pytest.raises(ValueError, match=reason):
            decode_attention.decode_attention(spec)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"phase": "decode"}, "phase"),
        ({"index": "tokens"}, "not of tokens"),
        ({"index": "blocks", "index_block": 24}, "multiple of 16 tokens"),
        ({"head_dim": 257}, "head dimensions"),
        ({"positions": True}, "positions"),
        ({"softcap": -1.0}, "softcap"),
        ({"window": 0}, "window"),
    ],
)
def test_prefill_declines(change: dict[str, object], reason: str) -> None:
    spec = replace(WINDOW, **change)  # type: ignore[arg-type]
    assert reason in (window_prefill.supports(spec) or "")
    with pytest.raises(ValueError, match=reason):
        window_prefill.prefill_attention(spec)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [({"tile": 64}, "no launch choice tile"), ({"block_n": 48}, "block_n"), ({"block_n": 64}, "up to 32")],
)
def test_choices_that_do_not_fit_are_refused(choices: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_attention.decode_attention(INT4, **choices)


@pytest.mark.parametrize(
    "spec", [DENSE, INT8, INT4, replace(INT8, index="blocks", index_block=16), GEAR, TURBO, LATENT]
)
def test_configs_can_be_built_and_start_with_the_tables(spec: AttentionSpec) -> None:
    found = decode_attention.configs(spec)
    assert len(set(found)) == len(found) > 3
    family, _ = tiles.device_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = tiles.decode_config(spec, family, 16)
    block_n = min(table.block_n, decode_source.widest_tile(spec) or 128)
    assert dict(found[0]) == {"block_n": block_n, "split": "kv", "stages": table.stages, "warps": table.warps}
    assert {dict(config)["split"] for config in found} == {"kv", "stream", "single"}
    for config in found:
        decode_attention.decode_attention(spec, **dict(config))


@pytest.mark.parametrize("spec", [WINDOW, replace(WINDOW, index="blocks", index_block=32)])
def test_prefill_configs_can_be_built_and_start_with_the_tables(spec: AttentionSpec) -> None:
    found = window_prefill.configs(spec)
    assert len(set(found)) == len(found) > 3
    family, _ = tiles.device_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table, limit = tiles.prefill_tile(spec, family), 32 if spec.index == "blocks" else 128
    first = {"block_m": min(table.block_m, limit), "block_n": min(table.block_n, limit)}
    assert dict(found[0]) == {**first, "stages": table.stages, "warps": table.warps}
    for config in found:
        window_prefill.prefill_attention(spec, **dict(config))
    with pytest.raises(ValueError, match="block_n"):
        window_prefill.prefill_attention(spec, block_n=24)


@pytest.mark.parametrize("total", [1, 3, 17, 264, 265, 5000])
def test_stream_programs_share_evenly(total: int) -> None:
    each = tiles.stream_tiles(total, 64, 132)
    assert 1 <= each <= total
    assert each == max(math.ceil(total / 264), min(4, total))


def test_what_no_program_can_encode_is_left_to_stock_operators() -> None:
    found = {}
    for size in (64, 80, 256):
        formats = (replace(fmt, head_dim=size) for fmt in (GEAR.key_format, GEAR.value_format))
        found[size] = tiles.completion_warps(AttentionSpec("decode", size, 4, "bfloat16", *formats, 0.125))
    assert found == {64: 16, 80: 16, 256: None}
    assert tiles.completion_warps(TURBO) == tiles.completion_warps(LATENT) == 8


@pytest.mark.parametrize("bits", [2, 4])
def test_the_polynomial_goes_through_the_table(bits: int) -> None:
    x = 2.0 * torch.arange(2**bits) + 1 - 2**bits
    y = torch.zeros(2**bits)
    for power in reversed(table_polynomial(bits)):
        y = y * x * x + power
    table = torch.tensor(codebook.gaussian(bits))
    assert ((y * x - table) / table).abs().max() < 3e-7


def test_latent_keys_need_what_they_are_rebuilt_with() -> None:
    buffers = [
        kv_format.allocate(fmt, 1, 2, 16, torch.device("cpu")) for fmt in (LATENT.key_format, LATENT.value_format)
    ]
    q, k_new, v_new = torch.zeros(1, 8, 1, 80), torch.zeros(1, 2, 1, 96), torch.zeros(1, 2, 1, 80)
    run = decode_attention.decode_attention(LATENT)
    for given in (None, torch.zeros(2, 16, 80)):
        with pytest.raises(ValueError, match=r"a projection \[2, 32, 80\]; found"):
            run(q, k_new, v_new, *buffers, torch.tensor([0, 4, 4]), projection=given, table=None)


def test_arguments_that_contradict_the_spec_are_refused() -> None:
    q, kv = torch.zeros(1, 4, 1, 64).bfloat16(), torch.zeros(1, 1, 16, 64).bfloat16()
    lens = torch.tensor([0, 4, 4])
    run = decode_attention.decode_attention(DENSE)
    with pytest.raises(ValueError, match="mask, positions"):
        run(q, kv[:, :, :1], kv[:, :, :1], kv, kv, lens, torch.ones(1, 1, 1, 5, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="side by side"):
        run(q, kv[:, :, :1], kv[:, :, :1], kv[:, :, ::2], kv, lens)
