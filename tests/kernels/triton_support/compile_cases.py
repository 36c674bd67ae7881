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

from torchaccel.kernels.triton import decode_attention, window_prefill
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
from .prefill_cases import PrefillCase

_ELEMENT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class CompileCase:
    """One kernel of one case for one device family, under the name the tests know it by."""

    name: str
    kernel: str
    family: str
    case: DecodeCase | PrefillCase


def compile_cases() -> list[CompileCase]:
    """Every row of the tables that a supported spec can reach, and the variants that no row tells apart."""
    return [*_table_cases(), *_variant_cases()]


def _table_cases() -> Iterator[CompileCase]:
    fields: dict[str, dict[str, Any]] = {
        "half": {},
        "int8": {"keys": "int8", "values": "int8"},
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


def _variant_cases() -> Iterator[CompileCase]:
    int8: dict[str, Any] = {"keys": "int8", "values": "int8", "head_dim": 128}
    masked: dict[str, Any] = {"window": 1000, "sinks": 4, "head_dim": 128}
    for family in SHARED_LIMIT:
        yield CompileCase(f"merge-{family}", "merge", family, DecodeCase("merge", head_dim=128))
        yield CompileCase(f"complete-{family}", "complete_block", family, DecodeCase("complete", new=4, **int8))
        yield CompileCase(f"window-{family}", "attend", family, DecodeCase("window", mask="additive", **masked))
        yield CompileCase(
            f"positions-{family}", "attend", family, DecodeCase("positions", mask="bool", positions=True, **int8)
        )
        yield CompileCase(
            f"static-{family}", "attend", family, DecodeCase("static", mask="bool", append=False, head_dim=128)
        )
        yield CompileCase(f"prefill-mask-{family}", "attend", family, PrefillCase("mask", mask="bool", **masked))


def _decode(kernel: str, case: DecodeCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec()
    module = load(decode_attention.generate(spec, case.append), "decode_attention")
    element = _ELEMENT[case.dtype]
    rows = padded(case.group * case.new)
    config = decode_config(spec, family, rows)
    if kernel == "merge":
        return module.merge, {"part": "*fp32", "out": element, "splits": "i32"}, {}, 4, 3
    types = dict.fromkeys(decode_attention.parameters(spec, case.append), "i32")
    types |= {"q": element, "k_new": element, "v_new": element, "dst": "*fp32", "positions": "*i32"}
    types |= {"k_buf": "*u8" if case.keys == "int8" else element, "v_buf": "*u8" if case.values == "int8" else element}
    types |= {"mask": "*i1" if case.mask == "bool" else "*fp32"}
    if kernel == "complete_block":
        return module.complete_block, types, {"Q": case.new, "BN": 64}, 8, 3
    constants: dict[str, Any] = {
        "Q": case.new,
        "BM": rows,
        "BN": config.block_n,
        "NEW": padded(case.new),
        "SPLIT": True,
        "PRECISION": PRECISION[family],
    }
    if case.mask != "none":
        constants |= {"MASK_ROWS": case.new > 1, "mask_c": 1}
        if case.mask == "additive" and case.sinks:
            constants |= {"MASK_FLOOR": -1.7e38}
    return module.attend, types, constants, config.warps, config.stages


def _prefill(case: PrefillCase, family: str) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    spec = case.spec()
    module = load(window_prefill.generate(spec), "window_prefill")
    tile = prefill_tile(spec, family)
    types = dict.fromkeys(window_prefill.parameters(spec), "i32")
    types |= dict.fromkeys(("q", "k", "v", "out"), _ELEMENT[case.dtype])
    types |= {"mask": "*i1" if case.mask == "bool" else "*fp32"}
    constants: dict[str, Any] = {"BM": tile.block_m, "BN": tile.block_n, "PRECISION": PRECISION[family]}
    if case.mask != "none":
        constants |= {"mask_c": 1}
        if case.mask == "additive" and case.sinks:
            constants |= {"MASK_FLOOR": -1.7e38}
    return module.attend, types, constants, tile.warps, tile.stages


def main() -> None:
    """Compile all cases in turn."""
    from .compile_for import compile_for, usage

    for item in compile_cases():
        began = time.perf_counter()
        line: dict[str, Any] = {"case": item.name, "error": None}
        try:
            if isinstance(item.case, DecodeCase):
                fn, types, constants, warps, stages = _decode(item.kernel, item.case, item.family)
            else:
                fn, types, constants, warps, stages = _prefill(item.case, item.family)
            used = usage(compile_for(fn, types, constants, item.family, warps, stages))
            line |= {"registers": used.registers, "spilt": used.spilt, "shared": used.shared}
        except Exception:
            line["error"] = traceback.format_exc()
        line["seconds"] = round(time.perf_counter() - began, 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
