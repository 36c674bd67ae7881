"""Compile every row of the launch tables for its device family and print one JSON line for each kernel.

``python -m tests.kernels.triton_support.compile_cases``; the environment must not ask for Triton's interpreter.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchaccel.kernels.triton import decode_source, merge, window_prefill
from torchaccel.kernels.triton.source import load, padded
from torchaccel.kernels.triton.tiles import (
    DECODE_TILES,
    MAX_ROWS,
    PRECISION,
    PREFILL_TILES,
    SHARED_LIMIT,
    decode_config,
    prefill_tile,
)

from .decode_cases import DecodeCase
from .merge_cases import MergeCase
from .prefill_cases import PrefillCase

_ELEMENT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class CompileCase:
    """One kernel of one case for one device family, under the name the tests know it by."""

    name: str
    kernel: str
    family: str
    case: DecodeCase | PrefillCase | MergeCase


def compile_cases() -> list[CompileCase]:
    """Every row of the tables that a supported spec can reach, and the variants that no row tells apart."""
    return [*_table_cases(), *_variant_cases()]


def _table_cases() -> Iterator[CompileCase]:
    # Two kinds of codes at once: whatever the number of bits, a row of the table holds.
    fields: dict[str, dict[str, Any]] = {
        "half": {},
        "quantised": {"keys": "int4", "values": "int8"},
        "float32": {"dtype": "float32"},
    }
    for family, storage, width in DECODE_TILES:
        rows = MAX_ROWS[storage, width]
        name = f"decode-{storage}-{width}-{family}"
        few = DecodeCase(name, head_dim=width, group=min(rows, 4), **fields[storage])
        yield CompileCase(f"{name}-few", "attend", family, few)
        if rows > 32:
            many = DecodeCase(name, head_dim=width, group=8, new=rows // 8, **fields[storage])
            yield CompileCase(f"{name}-many", "attend", family, many)
    for family, bits, width in PREFILL_TILES:
        name = f"prefill-{bits}-{width}-{family}"
        yield CompileCase(name, "attend", family, PrefillCase(name, head_dim=width, **fields[bits]))


# Kernels and variants that no row of the tables tells apart, by the kernel's name.
_INT8: dict[str, Any] = {"keys": "int8", "values": "int8", "head_dim": 128}
_INT4: dict[str, Any] = {"keys": "int4", "values": "int4", "head_dim": 128}
_VARIANTS: dict[str, tuple[str, DecodeCase]] = {
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
    "blocks-64": ("attend", PrefillCase("", index_block=64, window=None, sinks=0, head_dim=128)),
    "blocks-128": ("attend", PrefillCase("", index_block=128, window=None, sinks=0, head_dim=128, lse=True)),
    "weigh": ("weigh", PrefillCase("", mass=True, window=None, sinks=0, head_dim=128)),
    "weigh-blocks": ("weigh", PrefillCase("", index_block=64, mass=True, window=None, sinks=0, head_dim=128)),
}


def _variant_cases() -> Iterator[CompileCase]:
    for family in SHARED_LIMIT:
        for name, (kernel, case) in _VARIANTS.items():
            yield CompileCase(f"{name}-{family}", kernel, family, case)
        yield CompileCase(f"merge-16-parts-{family}", "merge", family, MergeCase("", merge.MOST, "bfloat16", 256))
        for name, (kernel, prompt) in _PREFILL_VARIANTS.items():
            yield CompileCase(f"prefill-{name}-{family}", kernel, family, prompt)


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
}


def _decode(kernel: str, case: DecodeCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec, stream = case.spec(), case.split == "stream"
    module = load(decode_source.generate(spec, case.append, stream), "decode_attention")
    rows = padded(case.group * case.new)
    config = decode_config(spec, family, rows)
    types = {name: "i32" for name in getattr(module, kernel).arg_names}
    types |= {name: _ELEMENT[case.dtype] if kind == "element" else kind for name, kind in _TYPES.items()}
    types |= {"k_buf": "*u8" if spec.key_format.is_quantised else types["q"], "mask": "*i1"}
    types |= {"v_buf": "*u8" if spec.value_format.is_quantised else types["q"]}
    if case.mask == "additive":
        types["mask"] = "*fp32"
    if kernel == "merge":
        return module.merge, types, {"ROWS": case.group * case.new}, 4, 3
    if kernel == "complete_block":
        return module.complete_block, types, {"Q": case.new}, 8, 3
    block_n = min(config.block_n, decode_source.widest_tile(spec) or config.block_n)
    constants: dict[str, Any] = {"Q": case.new, "BM": rows, "BN": block_n, "PRECISION": PRECISION[family]}
    if kernel == "attend":
        constants |= {"NEW": padded(case.new)} | ({} if stream else {"SPLIT": True})
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
    types |= {"mask": "*i1" if case.mask == "bool" else "*fp32", "lse": "*fp32", "mass": "*fp32", "index": "*i32"}
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


def main() -> None:
    """Compile all cases in turn."""
    from .compile_for import compile_for, usage

    for item in compile_cases():
        began = time.perf_counter()
        line: dict[str, Any] = {"case": item.name, "error": None}
        try:
            if isinstance(item.case, DecodeCase):
                fn, types, constants, warps, stages = _decode(item.kernel, item.case, item.family)
            elif isinstance(item.case, MergeCase):
                fn, types, constants, warps, stages = _merge(item.case)
            else:
                fn, types, constants, warps, stages = _prefill(item.kernel, item.case, item.family)
            used = usage(compile_for(fn, types, constants, item.family, warps, stages))
            line |= {"registers": used.registers, "spilt": used.spilt, "shared": used.shared}
        except Exception:
            line["error"] = traceback.format_exc()
        line["seconds"] = round(time.perf_counter() - began, 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
