"""Decode attention cases: inputs with poisoned unused memory, the expected result, and the check of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat
from torchaccel.kernels.triton.decode_attention import decode_attention
from torchaccel.kernels.triton.source import padded
from torchaccel.kernels.triton.tiles import decode_config, device_facts, max_rows

# Largest difference from the float32 reference, per unit of the largest expected value: rounding of the output and of
# the probabilities (bfloat16 keeps 8 bits, float16 11), sums in another order (float32).
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}


@dataclass(frozen=True)
class DecodeCase:
    """One call: ``spec`` fields, and ``live`` slots ``start .. end`` before ``new`` tokens come."""

    name: str
    head_dim: int = 64
    group: int = 4
    dtype: str = "bfloat16"
    keys: Literal["dense", "int8"] = "dense"
    values: Literal["dense", "int8"] = "dense"
    scale: float = 0.2
    causal: bool = True
    softcap: float | None = None
    mask: Literal["none", "bool", "additive"] = "none"
    mask_heads: bool = False
    lowest: bool = False
    left_padding: tuple[int, ...] = ()
    window: int | None = None
    sinks: int = 0
    positions: bool = False
    batch: int = 2
    kv_heads: int = 2
    start: int = 0
    end: int = 150
    evicted: int = 0
    new: int = 1
    append: bool = True
    splits: int | None = 2
    transposed: bool = False

    def spec(self) -> AttentionSpec:
        """The attention spec of the case."""
        fmt = KVFormat("dense", self.dtype, self.head_dim)
        return AttentionSpec(
            phase="decode",
            head_dim=self.head_dim,
            group=self.group,
            dtype=self.dtype,
            key_format=replace(fmt, kind=self.keys, axis="channel") if self.keys == "int8" else fmt,
            value_format=replace(fmt, kind=self.values, axis="token") if self.values == "int8" else fmt,
            scale=self.scale,
            causal=self.causal,
            softcap=self.softcap,
            mask=self.mask,
            window=self.window,
            sinks=self.sinks,
            positions=self.positions,
        )


DECODE_CASES: list[DecodeCase] = [
    DecodeCase("dense_bfloat16", transposed=True),
    DecodeCase("dense_float32_weird", head_dim=42, group=3, dtype="float32", end=123, start=6),
    DecodeCase("dense_float16_new_tokens", dtype="float16", group=1, new=5, end=42),
    DecodeCase("dense_one_split", splits=1, group=8, new=16, end=130),
    DecodeCase("dense_empty_cache", end=0, new=6, head_dim=6, dtype="float32"),
    DecodeCase("dense_more_splits_than_tiles", splits=20, end=123, batch=1),
    DecodeCase("dense_heuristic_splits", splits=None, end=600, batch=1, kv_heads=1, group=8),
    DecodeCase("dense_wide_head", head_dim=123, group=1, batch=1, end=42),
    DecodeCase("softcap", softcap=5.0, scale=1.0, dtype="float32"),
    DecodeCase("bool_mask", mask="bool", left_padding=(0, 70), new=2),
    DecodeCase("bool_mask_of_heads", mask="bool", mask_heads=True, new=3, dtype="float32"),
    DecodeCase("bool_mask_hides_a_row", mask="bool", left_padding=(0, 1000), new=2),
    DecodeCase("additive_mask", mask="additive", left_padding=(6, 42), dtype="float32"),
    DecodeCase("additive_mask_lowest_everywhere", mask="additive", left_padding=(0, 1000), lowest=True),
    DecodeCase("window", window=42, end=300, dtype="float32"),
    DecodeCase("window_and_sinks", window=70, sinks=6, end=300, start=3, new=3),
    DecodeCase("window_wider_than_cache", window=1000, sinks=4, end=100),
    DecodeCase("window_sinks_left_padding", window=40, sinks=4, end=200, mask="bool", left_padding=(0, 123)),
    DecodeCase(
        "window_sinks_additive", window=40, sinks=4, end=200, mask="additive", left_padding=(3, 90), dtype="float32"
    ),
    DecodeCase("window_not_causal", window=20, causal=False, new=4, dtype="float32", end=80),
    DecodeCase("not_causal", causal=False, new=4, dtype="float32", end=20),
    DecodeCase("positions", positions=True, evicted=50, new=2),
    DecodeCase("positions_window_sinks", positions=True, evicted=42, window=60, sinks=4, dtype="float32"),
    DecodeCase("positions_mask", positions=True, evicted=30, mask="bool", left_padding=(0, 60), window=60, sinks=6),
    DecodeCase("int8", keys="int8", values="int8"),
    DecodeCase("int8_block_completes", keys="int8", values="int8", end=127),
    DecodeCase("int8_block_completes_and_opens", keys="int8", values="int8", end=123, new=9, start=70),
    DecodeCase("int8_short", keys="int8", values="int8", end=6, new=3, dtype="float32"),
    DecodeCase("int8_weird_head", keys="int8", values="int8", head_dim=42, end=190, new=6, dtype="float16", group=3),
    DecodeCase("int8_window_sinks", keys="int8", values="int8", end=400, window=70, sinks=6, splits=3, batch=1),
    DecodeCase("int8_positions_mask", keys="int8", values="int8", positions=True, evicted=20, mask="bool", new=2),
    DecodeCase("int8_keys_only", keys="int8", end=126, new=4, dtype="float32", softcap=20.0),
    DecodeCase("int8_values_only", values="int8", end=126, new=4, mask="additive", batch=1),
    DecodeCase("int8_static", keys="int8", values="int8", append=False, end=150),
    DecodeCase("static", append=False, causal=False, mask="bool", left_padding=(0, 6), end=300, splits=3),
    DecodeCase("dense_in_parts", new=20, end=42, batch=1, mask="bool", dtype="float32", head_dim=16),
    DecodeCase(
        "int8_in_parts", keys="int8", values="int8", head_dim=128, group=8, new=12, end=120, batch=1, kv_heads=1
    ),
    DecodeCase("positions_in_parts", positions=True, evicted=5, new=17, end=20, batch=1, kv_heads=1),
    DecodeCase("static_causal", append=False, new=3, dtype="float32"),
]


def _mask(case: DecodeCase, columns: int, generator: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    heads = case.kv_heads * case.group if case.mask_heads else 1
    allowed = torch.rand(case.batch, heads, case.new, columns, generator=generator) > 0.3
    for row, padding in enumerate(case.left_padding):
        allowed[row, ..., :padding] = False
        allowed[row, ..., padding : padding + 1] = True
    if not case.append:
        # A static cache: only a prefix of its slots is written.
        allowed[..., columns // 2 :] = False
    if case.mask == "bool":
        return allowed
    hidden = torch.finfo(torch.float32).min if case.lowest else -torch.inf
    bias = torch.randn(allowed.shape, generator=generator)
    return bias.masked_fill(~allowed, hidden)


def _filled(case: DecodeCase, fmt: KVFormat, rows: Tensor) -> Tensor:
    """A buffer that holds ``rows`` ``[B, H, end, D]``, everything else poisoned (all bits set: NaN in every dtype)."""
    full = kv_format.allocate(fmt, case.batch + 1, case.kv_heads, case.end + case.new + 70, torch.device("cpu"))
    full.view(torch.uint8).fill_(255)
    kv_format.append(fmt, full[: case.batch], 0, rows)
    if fmt.kind == "dense":
        full[: case.batch, :, : case.start].view(torch.uint8).fill_(255)
    return full


def run_decode_case(case: DecodeCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    spec = case.spec()
    generator = torch.Generator().manual_seed(0)
    dtype, heads, d = DTYPES[case.dtype], case.kv_heads * case.group, case.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q = random(case.batch, heads, case.new, d)
    k_new, v_new = (random(case.batch, case.kv_heads, case.new, d) for _ in range(2))
    k_full, v_full = (
        _filled(case, fmt, random(case.batch, case.kv_heads, case.end, d))
        for fmt in (spec.key_format, spec.value_format)
    )
    logical = case.end - case.start + case.evicted
    lens = torch.tensor([case.start, case.end, logical])
    positions = None
    if case.positions:
        # Some columns were evicted: the stored ones are increasing with gaps, and differ between batch rows.
        positions = torch.full((case.batch + 1, case.end + case.new + 70), -1, dtype=torch.int32)
        for row in range(case.batch):
            kept = torch.randperm(logical, generator=generator)[: case.end].sort().values
            positions[row, : case.end] = kept.to(torch.int32)
    mask = _mask(case, logical + case.new if case.append else case.end - case.start, generator)

    inputs = [q, k_new, v_new, k_full, v_full, mask, positions]
    moved = [None if x is None else x.clone().to(device) for x in inputs]
    if case.transposed:
        moved[:2] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in moved[:2]]
    if moved[5] is not None and moved[5].dtype == torch.bool:
        # Every second column of a wider mask: a stride other than 1, and wrong answers for who ignores it.
        moved[5] = torch.stack([moved[5], ~moved[5]], -1).flatten(-2)[..., ::2]
    expected = _expected(case, spec, inputs, lens)
    got = _run(case, spec, moved, lens)
    return _difference(case, expected, got, inputs, moved)


def _expected(case: DecodeCase, spec: AttentionSpec, inputs: list[Any], lens: Tensor) -> Tensor:
    q, k_new, v_new, k_full, v_full, mask, positions = inputs
    k, v = k_full[: case.batch], v_full[: case.batch]
    if case.append:
        rows = None if positions is None else positions[: case.batch]
        return reference.decode_attention(spec, q, k_new, v_new, k, v, lens, mask, rows)
    start, end, logical = lens.tolist()
    k = kv_format.read(spec.key_format, k, start, end, end)
    v = kv_format.read(spec.value_format, v, start, end, end)
    columns = torch.arange(end - start).expand(case.batch, -1)
    return reference.attend(spec, q, k, v, columns, torch.arange(logical, logical + case.new), mask)


def _run(case: DecodeCase, spec: AttentionSpec, moved: list[Any], lens: Tensor) -> Tensor:
    q, k_new, v_new, k_full, v_full, mask, positions = moved
    config = None
    if case.splits is not None:
        family, _ = device_facts(q.device)
        rows = min(padded(case.group * case.new), max_rows(spec))
        config = replace(decode_config(spec, family, rows), splits=case.splits)
    columns = None if positions is None else positions[: case.batch]
    new = (k_new, v_new) if case.append else (None, None)
    return decode_attention(spec, config)(q, *new, k_full[: case.batch], v_full[: case.batch], lens, mask, columns)


def _difference(case: DecodeCase, expected: Tensor, got: Tensor, inputs: list[Any], moved: list[Any]) -> str | None:
    for name, before, after in zip(("keys", "values"), inputs[3:5], moved[3:5], strict=True):
        if not torch.equal(before.view(torch.uint8), after.cpu().view(torch.uint8)):
            return f"the {name} buffer differs from the reference's"
    if case.positions and not torch.equal(inputs[6], moved[6].cpu()):
        return "the positions differ from the reference's"
    got = got.cpu()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"expected {expected.dtype} {tuple(expected.shape)}, found {got.dtype} {tuple(got.shape)}"
    bound = TOLERANCE[case.dtype] * float(expected.float().abs().max())
    error = float((got.float() - expected.float()).abs().max())
    return None if error <= bound else f"largest error {error:.3g}, allowed {bound:.3g}"
