"""Compile every row of the launch tables for its device family and print one JSON line for each kernel.

``python -m tests.kernels.triton_support.compile_cases``; the environment must not ask for Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torchaccel.kernels.selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from torchaccel.kernels.triton import (
    decode_attention,
    decode_source,
    fused,
    gather_tokens,
    merge,
    prompt_selection,
    row_sums,
    selection,
    sparse_mlp,
    summary,
    threshold_linear,
    window_prefill,
)
from torchaccel.kernels.triton.source import load, padded
from torchaccel.kernels.triton.tiles import (
    DECODE_TILES,
    MAX_ROWS,
    PRECISION,
    PREFILL_TILES,
    SHARED_LIMIT,
    completion_warps,
    decode_config,
    prefill_tile,
)

from tests.kernels.fused_cases import between_attentions, layer_norm_mlp, packed_heads

from .decode_cases import DecodeCase
from .fused_cases import FusedCase, add_norm
from .gather_cases import GatherCase
from .merge_cases import MergeCase
from .prefill_cases import PrefillCase
from .selection_cases import PromptCase, SelectionCase, SummaryCase
from .sparse_cases import SparseMlpCase, ThresholdCase

_ELEMENT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


Case = (
    DecodeCase
    | PrefillCase
    | MergeCase
    | SummaryCase
    | SelectionCase
    | PromptCase
    | FusedCase
    | SparseMlpCase
    | ThresholdCase
    | GatherCase
)


@dataclass(frozen=True)
class CompileCase:
    """One kernel of one case for one device family, under the name the tests know it by."""

    name: str
    kernel: str
    family: str
    case: Case


def compile_cases(*, every: bool = True) -> list[CompileCase]:
    """Every row of the tables that a supported spec can reach, and the variants that no row tells apart.

    every: variants on every family; else on sm_90 alone.
    """
    return [*_table_cases(), *(case for case in _variant_cases() if every or case.family == "sm_90")]


def _table_cases() -> Iterator[CompileCase]:
    # Two kinds of codes at once: whatever the number of bits, a row of the table holds.
    fields: dict[str, dict[str, Any]] = {
        "half": {},
        "quantised": {"keys": "int4", "values": "int8"},
        "latent": {"keys": "latent", "key_rank": 24},
        "float32": {"dtype": "float32"},
    }
    for family, storage, width in DECODE_TILES:
        rows = MAX_ROWS[storage, width]
        turned = {"turned": width} if storage == "latent" else {}
        name = f"decode-{storage}-{width}-{family}"
        few = DecodeCase(name, head_dim=width, group=min(rows, 4), **fields[storage], **turned)
        yield CompileCase(f"{name}-few", "attend", family, few)
        if rows > 32:
            many = DecodeCase(name, head_dim=width, group=8, new=rows // 8, **fields[storage], **turned)
            yield CompileCase(f"{name}-many", "attend", family, many)
    for family, bits, width in PREFILL_TILES:
        name = f"prefill-{bits}-{width}-{family}"
        yield CompileCase(name, "attend", family, PrefillCase(name, head_dim=width, **fields[bits]))


# Kernels and variants that no row of the tables tells apart, by the kernel's name.
_INT8: dict[str, Any] = {"keys": "int8", "values": "int8", "head_dim": 128}
_INT4: dict[str, Any] = {"keys": "int4", "values": "int4", "head_dim": 128}
_GEAR: dict[str, Any] = {"head_dim": 128, "group": 8, "key_rank": 2, "value_rank": 2, "key_group": 64}
_OUTLIERS: dict[str, Any] = {"key_outliers": 2, "value_outliers": 2}
_TURBO: dict[str, Any] = {"key_axis": "token", "codebook": "gaussian", "head_dim": 128, "group": 8}
_LATENT: dict[str, Any] = {"keys": "latent", "key_rank": 32, "turned": 128, "head_dim": 128, "group": 8}
_VARIANTS: dict[str, tuple[str, DecodeCase]] = {
    "gear": ("attend", DecodeCase("", keys="int2", values="int2", **_GEAR, **_OUTLIERS)),
    "gear-int4-low-rank": ("attend", DecodeCase("", keys="int4", values="int4", **_GEAR)),
    "gear-16-outliers": (
        "attend",
        DecodeCase("", keys="int2", values="int2", **_GEAR, key_outliers=16, value_outliers=16, split="stream"),
    ),
    "gear-blocks": ("attend", DecodeCase("", keys="int2", values="int2", **_GEAR, **_OUTLIERS, index="blocks")),
    "gear-tokens": ("attend", DecodeCase("", keys="int4", values="int4", **_GEAR, **_OUTLIERS, index="tokens")),
    "gear-complete": ("complete_block", DecodeCase("", keys="int2", values="int2", **_GEAR, **_OUTLIERS)),
    "turbo-int4": ("attend", DecodeCase("", keys="int4", values="int4", **_TURBO)),
    "turbo-int2-tokens": ("attend", DecodeCase("", keys="int2", values="int2", **_TURBO, index="tokens")),
    "turbo-complete": ("complete_block", DecodeCase("", keys="int4", values="int2", **_TURBO)),
    "latent-int8": ("attend", DecodeCase("", values="int8", **_LATENT)),
    "latent-partly-turned": ("attend", DecodeCase("", **_LATENT | {"turned": 32}, index="blocks", split="stream")),
    "latent-tokens": (
        "attend",
        DecodeCase("", **_LATENT | {"key_rank": 7}, index="tokens", rotary="half", rotary_dim=128),
    ),
    "latent-complete": ("complete_block", DecodeCase("", values="int4", **_LATENT)),
    "latent-weigh": ("weigh", DecodeCase("", **_LATENT, mass=True, append=False)),
    "merge": ("merge", DecodeCase("", head_dim=128)),
    "merge-stream": ("merge", DecodeCase("", head_dim=128, split="stream", lse=True)),
    "complete": ("complete_block", DecodeCase("", new=4, **_INT8)),
    "complete-int2": (
        "complete_block",
        DecodeCase("", keys="int2", values="int4", key_axis="token", key_group=32, value_axis="channel", head_dim=128),
    ),
    "window": ("attend", DecodeCase("", window=1000, sinks=4, mask="additive", head_dim=128)),
    "head-windows": ("attend", DecodeCase("", window=1000, sinks=4, head_windows=True, head_dim=128)),
    "positions": ("attend", DecodeCase("", mask="bool", positions=True, **_INT8)),
    "static": ("attend", DecodeCase("", mask="bool", append=False, head_dim=128)),
    "stream": ("attend", DecodeCase("", split="stream", head_dim=128)),
    "stream-int4": ("attend", DecodeCase("", split="stream", tail=64, **_INT4)),
    "int2": ("attend", DecodeCase("", keys="int2", values="int2", head_dim=128)),
    "int4-groups": ("attend", DecodeCase("", key_group=32, value_group=32, tail=64, **_INT4)),
    "int4-other-axes": ("attend", DecodeCase("", key_axis="token", key_group=64, value_axis="channel", **_INT4)),
    "blocks": ("attend", DecodeCase("", index="blocks", head_dim=128)),
    "blocks-int4": ("attend", DecodeCase("", index="blocks", **_INT4)),
    "tokens": ("attend", DecodeCase("", index="tokens", head_dim=128)),
    "tokens-int4": ("attend", DecodeCase("", index="tokens", **_INT4)),
    "rotary": ("attend", DecodeCase("", rotary="half", rotary_dim=128, head_dim=128)),
    "rotary-int8": ("attend", DecodeCase("", rotary="interleaved", rotary_dim=64, **_INT8)),
    "weigh": ("weigh", DecodeCase("", mass=True, append=False, head_dim=128)),
    "weigh-blocks-int4": ("weigh", DecodeCase("", mass=True, append=False, index="blocks", **_INT4)),
}
_PREFILL_VARIANTS: dict[str, tuple[str, PrefillCase]] = {
    "mask": ("attend", PrefillCase("", mask="bool", window=1000, head_dim=128)),
    "head-windows": ("attend", PrefillCase("", window=1000, sinks=4, head_windows=True, head_dim=128)),
    "blocks-64": ("attend", PrefillCase("", index_block=64, window=None, sinks=0, head_dim=128)),
    "blocks-128": ("attend", PrefillCase("", index_block=128, window=None, sinks=0, head_dim=128, lse=True)),
    "weigh": ("weigh", PrefillCase("", mass=True, window=None, sinks=0, head_dim=128)),
    "weigh-blocks": ("weigh", PrefillCase("", index_block=64, mass=True, window=None, sinks=0, head_dim=128)),
}


def _bounds(dtype: str, head_dim: int, **fields: Any) -> SelectionSpec:
    return SelectionSpec(SummarySpec("minmax", head_dim, dtype, dtype), fields.pop("group", 4), dtype, 64, **fields)


_LABELS = SelectionSpec(SummarySpec("channels", 128, "bfloat16", "bfloat16", 1, 16), 4, "bfloat16", 999)
# All that chooses blocks: (kernel, case).
_SELECTIONS: dict[str, tuple[str, SummaryCase | SelectionCase | PromptCase]] = {
    "summary-bounds": ("summarise", SummaryCase("", SummarySpec("minmax", 128, "bfloat16", "bfloat16"), ())),
    "summary-mean": ("summarise", SummaryCase("", SummarySpec("mean", 80, "float16", "float32"), ())),
    "summary-channels": ("summarise", SummaryCase("", SummarySpec("channels", 128, "bfloat16", "bfloat16", 1, 20), ())),
    "bounds": ("select", SelectionCase("", _bounds("bfloat16", 128, sinks=1, recent=2), 0)),
    "mean-softmax": (
        "select",
        SelectionCase(
            "",
            SelectionSpec(
                SummarySpec("mean", 128, "bfloat16", "bfloat16"), 6, "bfloat16", 64, "softmax", 0.1, 2, 1, 1, 0.9
            ),
            0,
        ),
    ),
    "labels": ("score", SelectionCase("", _LABELS, 0)),
    "antidiagonal": (
        "estimate",
        PromptCase("", PromptSelectionSpec("antidiagonal", 128, 4, "bfloat16", 0.1, 64, mass=0.9), 0),
    ),
    "prompt-mean": ("estimate", PromptCase("", PromptSelectionSpec("mean", 256, 4, "bfloat16", 0.1, 64), 0)),
    "prompt-average": ("average", PromptCase("", PromptSelectionSpec("mean", 80, 4, "bfloat16", 0.1, 64), 0)),
}
# What takes long to compile, each for the family that came closest to its limits.
_SLOW_SELECTIONS: dict[str, tuple[str, str, SelectionCase | PromptCase]] = {
    "labels-choice-sm_80": ("choose", "sm_80", SelectionCase("", replace(_LABELS, mass=0.9), 1 << 17)),
    "bounds-256-gfx942": (
        "select",
        "gfx942",
        SelectionCase("", _bounds("bfloat16", 256, group=32, reduce="mean", pool=4), 0),
    ),
    "bounds-float32-sm_80": ("select", "sm_80", SelectionCase("", _bounds("float32", 256, sinks=1, mass=0.9), 0)),
    "antidiagonal-float32-gfx942": (
        "estimate",
        "gfx942",
        PromptCase("", PromptSelectionSpec("antidiagonal", 256, 4, "float32", 0.1, 64, 192, 16), 0),
    ),
}
# Launches of fused programs: (number of the launch, case).
_FUSED: dict[str, tuple[int, FusedCase]] = {
    "fused-between-attentions": (3, FusedCase("", partial(between_attentions, act="silu", d=3456, ff=9216), rows=1)),
    "fused-layer-norm": (0, FusedCase("", layer_norm_mlp, "float32", 8)),
    "fused-by-columns": (1, FusedCase("", layer_norm_mlp, "bfloat16", 8)),
    "fused-packed-heads": (1, FusedCase("", packed_heads, "float16", 16)),
    "fused-rotated-heads": (2, FusedCase("", packed_heads, "bfloat16", 2)),
    "fused-add-norm": (0, FusedCase("", add_norm, "bfloat16", 4096)),
}
# Kernels that read a part of their weights: (kernel, case).
_SPARSE: dict[str, tuple[str, SparseMlpCase | ThresholdCase]] = {
    "sparse-mlp": ("activate", SparseMlpCase("", width=4096, lists=1)),
    "sparse-mlp-own-lists": ("collect", SparseMlpCase("", rows=8, width=4096, lists=8)),
    "sparse-mlp-float32": ("activate", SparseMlpCase("", "float32", 2, 1000, activation="gelu")),
    "sparse-mlp-collect": ("collect", SparseMlpCase("", "float16", width=123)),
    "threshold": ("collect", ThresholdCase("", outputs=4096)),
    "threshold-float32": ("collect", ThresholdCase("", "float32", 16, outputs=1000, each=True)),
    "threshold-total": ("total", ThresholdCase("", outputs=4096)),
}


def _variant_cases() -> Iterator[CompileCase]:
    for family in SHARED_LIMIT:
        for name, (kernel, case) in _VARIANTS.items():
            yield CompileCase(f"{name}-{family}", kernel, family, case)
        yield CompileCase(f"merge-16-parts-{family}", "merge", family, MergeCase("", merge.MOST, "bfloat16", 256))
        for name, (kernel, prompt) in _PREFILL_VARIANTS.items():
            yield CompileCase(f"prefill-{name}-{family}", kernel, family, prompt)
        for name, (kernel, choice) in _SELECTIONS.items():
            yield CompileCase(f"{name}-{family}", kernel, family, choice)
        for name, (phase, program) in _FUSED.items():
            yield CompileCase(f"{name}-{family}", f"phase_{phase}", family, program)
        yield CompileCase(f"gather-{family}", "gather", family, GatherCase(""))
        for name, (kernel, part) in _SPARSE.items():
            yield CompileCase(f"{name}-{family}", kernel, family, part)
    for name, (kernel, family, choice) in _SLOW_SELECTIONS.items():
        yield CompileCase(name, kernel, family, choice)


_TYPES = {
    "out": "element",
    "q": "element",
    "k_new": "element",
    "v_new": "element",
    "part": "*fp32",
    "lse": "*fp32",
    "mass": "*fp32",
    "positions": "*i32",
    "index": "*i32",
    "head_windows": "*i32",
    "cos": "element",
    "sin": "element",
    "projection": "element",
    "angles": "*fp32",
}


def _decode(kernel: str, case: DecodeCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec, stream = case.spec(), case.split == "stream"
    module = load(decode_source.generate(spec, case.append, stream), "decode_attention")
    rows = padded(case.group * case.new)
    config = decode_config(spec, family, rows)
    types = {name: "i32" for name in getattr(module, kernel).arg_names}
    types |= {name: _ELEMENT[case.dtype] if kind == "element" else kind for name, kind in _TYPES.items()}
    types |= {"k_buf": "*u8" if spec.key_format.is_blocked else types["q"], "mask": "*i1"}
    types |= {"v_buf": "*u8" if spec.value_format.is_blocked else types["q"]}
    if case.mask == "additive":
        types["mask"] = "*fp32"
    if kernel == "merge":
        return module.merge, types, {"ROWS": case.group * case.new}, 4, 3
    if kernel == "complete_block":
        return module.complete_block, types, {"Q": case.new}, completion_warps(spec) or 8, 3
    block_n = min(config.block_n, decode_source.widest_tile(spec) or config.block_n)
    constants: dict[str, Any] = {"Q": case.new, "BM": rows, "BN": block_n, "PRECISION": PRECISION[family]}
    if kernel == "attend":
        constants |= {"NEW": padded(case.new)} | ({} if stream else {"SPLIT": True})
    if case.keys == "latent":
        constants |= decode_attention.turned_parts(case.turned, case.head_dim)
    if case.mask != "none":
        constants |= {"MASK_ROWS": case.new > 1, "mask_c": 1}
        if case.mask == "additive" and case.sinks:
            constants |= {"MASK_FLOOR": -1.7e38}
    return getattr(module, kernel), types, constants, config.warps, config.stages


def _prefill(kernel: str, case: PrefillCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec()
    module = load(window_prefill.generate(spec), "window_prefill")
    tile = prefill_tile(spec, family)
    widest = spec.index_block if spec.index == "blocks" else 128
    types = dict.fromkeys(getattr(module, kernel).arg_names, "i32")
    types |= dict.fromkeys(("q", "k", "v", "out"), _ELEMENT[case.dtype])
    types |= {"mask": "*i1" if case.mask == "bool" else "*fp32", "lse": "*fp32", "mass": "*fp32"}
    types |= {"index": "*i32", "head_windows": "*i32"}
    constants: dict[str, Any] = {
        "BM": min(tile.block_m, widest),
        "BN": min(tile.block_n, widest),
        "PRECISION": PRECISION[family],
    }
    if case.mask != "none":
        constants |= {"mask_c": 1}
        if case.mask == "additive" and case.sinks:
            constants |= {"MASK_FLOOR": -1.7e38}
    return getattr(module, kernel), types, constants, tile.warps, tile.stages


def _merge(case: MergeCase) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    module = load(merge.generate(case.parts, case.head_dim), "merge")
    types = {name: "*fp32" if name.startswith("lse") else _ELEMENT[case.dtype] for name in module.merge.arg_names}
    return module.merge, types | {"rows": "i32"}, {"BM": merge.ROWS}, 4, 3


def _summary(case: SummaryCase) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec
    module = load(summary.generate(spec), "summary")
    types = dict.fromkeys(module.summarise.arg_names, "i32") | {"k": _ELEMENT[spec.dtype]}
    types |= {"summary": _ELEMENT[spec.stored], "before": "*fp32", "sums": "*fp32"}
    return module.summarise, types | {"channels": "*i32", "first": "*i64"}, {}, 2, 3


def _selection(kernel: str, case: SelectionCase) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec
    fn = getattr(load(selection.generate(spec), "selection"), kernel)
    types = dict.fromkeys(fn.arg_names, "i32") | {"q": _ELEMENT[spec.dtype], "summary": _ELEMENT[spec.summary.stored]}
    types |= {"scores": "*fp32", "logits": "*fp32", "out": "*i32", "channels": "*i32"}
    size, warps = selection.tile(spec)
    each, step_warps = selection.step(case.length)
    constants = {"BN": size, "BC": each, "first": None}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    return fn, types, constants, step_warps if kernel == "choose" else warps, 2


def _prompt_selection(kernel: str, case: PromptCase) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec
    fn = getattr(load(prompt_selection.generate(spec), "prompt_selection"), kernel)
    types = dict.fromkeys(fn.arg_names, "i32") | dict.fromkeys(("q", "k", "x"), _ELEMENT[spec.dtype])
    if kernel == "estimate" and spec.estimate == "mean":
        types |= {"q": "*fp32", "k": "*fp32"}
    types |= {"first": "*i64", "scores": "*fp32", "means": "*fp32", "out": "*i32"}
    queries, keys, warps = prompt_selection.tile(spec)
    constants = {"BM": queries, "BN": keys, "BC": prompt_selection.STEP}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    return fn, types, constants, warps if kernel == "estimate" else 2, 2 if kernel == "estimate" else 3


def _fused(kernel: str, case: FusedCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec()
    fn = getattr(load(fused.generate(spec), "fused"), kernel)
    types = dict.fromkeys(fn.arg_names, _ELEMENT[spec.dtype]) | {"work": "*fp32"}
    types |= {f"in{i}": "*i64" for i, item in enumerate(spec.inputs) if item.kind == "index"}
    warps, stages = fused.config(spec).warps, fused.program_of(spec).stages
    return fn, types, {"PRECISION": PRECISION[family]}, warps, stages


def _sparse_mlp(kernel: str, case: SparseMlpCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    fn = getattr(load(sparse_mlp.generate(case.spec()), "sparse_mlp"), kernel)
    types = dict.fromkeys(fn.arg_names, _ELEMENT[case.dtype])
    types |= {"neurons": "*i32", "partial": "*fp32", "F": "i32", "L": "i32", "each": "i32"}
    constants: dict[str, Any] = {"M": case.rows, "H": case.width, "LISTED": min(case.lists, 2)}
    constants |= {"gate_row": 3 * case.width, "up_row": 3 * case.width, "down_row": 3 * case.width}
    constants |= {"BN": sparse_mlp.NEURONS, "BK": sparse_mlp.depth(case.spec())}
    constants |= {"BI": row_sums.ROWS_SUMMED, "BC": row_sums.COLUMNS}
    constants |= {"PRECISION": PRECISION[family]} | ({} if case.lists else {"neurons": None})
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    return fn, types, constants, sparse_mlp.WARPS, sparse_mlp.STAGES


def _threshold(kernel: str, case: ThresholdCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    fn = getattr(load(threshold_linear.generate(case.spec()), "threshold_linear"), kernel)
    types = dict.fromkeys(fn.arg_names, _ELEMENT[case.dtype])
    types |= {"threshold": "*fp32", "partial": "*fp32", "K": "i32", "each": "i32", "splits": "i32"}
    constants: dict[str, Any] = {"M": case.rows, "N": case.outputs, "EACH_HAS": case.each}
    columns = row_sums.COLUMNS if kernel == "collect" else row_sums.TOTAL_COLUMNS
    constants |= {"BI": row_sums.ROWS_SUMMED, "BC": columns, "PRECISION": PRECISION[family]}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    return fn, types, constants, threshold_linear.WARPS, threshold_linear.STAGES


def _gather(case: GatherCase) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec()
    fn = load(gather_tokens.generate(spec), "gather_tokens").gather
    types = dict.fromkeys(fn.arg_names, "i32") | {"index": "*i64"}
    for i, item in enumerate(spec.items):
        types |= dict.fromkeys((f"x{i}", f"y{i}"), f"*{'u8' if item.width == 1 else f'i{8 * item.width}'}")
    return fn, types, {"BC": gather_tokens.COLUMNS}, 4, 3


def _described(item: CompileCase) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    """The kernel of a case, the types of its arguments, its constants, warps and stages."""
    kernel, case, family = item.kernel, item.case, item.family
    if isinstance(case, DecodeCase):
        return _decode(kernel, case, family)
    if isinstance(case, PrefillCase):
        return _prefill(kernel, case, family)
    if isinstance(case, MergeCase):
        return _merge(case)
    if isinstance(case, SummaryCase):
        return _summary(case)
    if isinstance(case, SelectionCase):
        return _selection(kernel, case)
    if isinstance(case, PromptCase):
        return _prompt_selection(kernel, case)
    if isinstance(case, GatherCase):
        return _gather(case)
    if isinstance(case, SparseMlpCase):
        return _sparse_mlp(kernel, case, family)
    if isinstance(case, ThresholdCase):
        return _threshold(kernel, case, family)
    return _fused(kernel, case, family)


def main() -> None:
    """Compile all cases in turn, or those named on the command line."""
    from .compile_for import compile_for, usage

    for item in compile_cases():
        if sys.argv[1:] and item.name not in sys.argv[1:]:
            continue
        began = time.perf_counter()
        line: dict[str, Any] = {"case": item.name, "error": None}
        try:
            fn, types, constants, warps, stages = _described(item)
            used = usage(compile_for(fn, types, constants, item.family, warps, stages))
            line |= {"registers": used.registers, "spilt": used.spilt, "shared": used.shared}
        except Exception:
            line["error"] = traceback.format_exc()
        line["seconds"] = round(time.perf_counter() - began, 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
