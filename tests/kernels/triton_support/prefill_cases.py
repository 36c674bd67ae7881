"""Prefill attention cases over a window and sinks, or listed blocks: inputs, the expected result, and the check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchaccel.kernels import reference
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat
from torchaccel.kernels.triton.window_prefill import prefill_attention

from .decode_cases import TOLERANCE, difference


@dataclass(frozen=True)
class PrefillCase:
    """One prompt of ``tokens`` tokens, and the spec fields of its attention."""

    name: str
    head_dim: int = 64
    group: int = 4
    dtype: str = "bfloat16"
    causal: bool = True
    softcap: float | None = None
    mask: Literal["none", "bool", "additive"] = "none"
    left_padding: tuple[int, ...] = ()
    window: int | None = 40
    sinks: int = 4
    head_windows: bool = False
    index_block: int = 0
    lse: bool = False
    mass: bool = False
    batch: int = 1
    kv_heads: int = 1
    tokens: int = 200
    tile: tuple[int, int] = (64, 32)
    transposed: bool = False

    def spec(self) -> AttentionSpec:
        """The attention spec of the case."""
        fmt = KVFormat("dense", self.dtype, self.head_dim)
        return AttentionSpec(
            phase="prefill",
            head_dim=self.head_dim,
            group=self.group,
            dtype=self.dtype,
            key_format=fmt,
            value_format=fmt,
            scale=0.2,
            causal=self.causal,
            softcap=self.softcap,
            mask=self.mask,
            window=self.window,
            sinks=self.sinks,
            head_windows=self.head_windows,
            index="blocks" if self.index_block else "contiguous",
            index_block=self.index_block or 64,
            lse=self.lse,
            mass=self.mass,
        )


PREFILL_CASES = [
    PrefillCase("prefill_bfloat16", batch=2, kv_heads=2, group=1, tokens=123, transposed=True),
    PrefillCase("prefill_float32", dtype="float32", group=3, tokens=170, window=70, sinks=40),
    PrefillCase("prefill_float16_weird_head", dtype="float16", head_dim=42, group=1, tokens=123, sinks=0),
    PrefillCase("prefill_causal", dtype="float32", window=None, sinks=0, group=1, tokens=150),
    PrefillCase("prefill_window_wider_than_prompt", window=500, sinks=6, group=2, tokens=130),
    PrefillCase("prefill_window_of_one", window=1, sinks=1, group=1, dtype="float32", tokens=100),
    PrefillCase("prefill_short", tokens=6, group=8, window=3, sinks=1, dtype="float32", head_dim=6),
    PrefillCase("prefill_wide_tiles", tokens=300, group=1, tile=(128, 64), window=100, sinks=70),
    PrefillCase("prefill_narrow_rows", tokens=200, group=1, tile=(16, 64), window=20, dtype="float32"),
    PrefillCase("prefill_softcap", softcap=5.0, group=1, dtype="float32", tokens=100),
    PrefillCase("prefill_bool_mask", mask="bool", left_padding=(0, 123), batch=2, group=1),
    PrefillCase("prefill_additive_mask", mask="additive", left_padding=(0, 42), batch=2, group=1, dtype="float32"),
    PrefillCase(
        "prefill_padding_hides_all", mask="bool", left_padding=(1000,), group=1, tokens=70, lse=True, mass=True
    ),
    PrefillCase("prefill_not_causal", causal=False, window=None, sinks=0, group=3, tokens=123, dtype="float32"),
    PrefillCase("prefill_not_causal_window", causal=False, group=1, tokens=200, dtype="float32"),
    PrefillCase("prefill_sides", group=3, tokens=150, lse=True, mass=True, batch=2),
    PrefillCase("prefill_mass_additive", mask="additive", group=2, tokens=123, mass=True, dtype="float32", kv_heads=2),
    PrefillCase("prefill_head_windows", head_windows=True, kv_heads=3, group=2, tokens=170, dtype="float32", lse=True),
    PrefillCase(
        "prefill_head_windows_masked",
        head_windows=True,
        kv_heads=2,
        group=1,
        mask="bool",
        left_padding=(42,),
        mass=True,
    ),
    PrefillCase("prefill_head_windows_blocks", head_windows=True, kv_heads=2, group=1, index_block=32, tokens=123),
    PrefillCase("prefill_blocks", window=None, sinks=0, index_block=64, tokens=300, group=3, batch=2),
    PrefillCase(
        "prefill_blocks_sides", index_block=32, tokens=123, group=2, dtype="float32", lse=True, mass=True, kv_heads=2
    ),
    PrefillCase("prefill_blocks_masked", index_block=48, tokens=130, mask="bool", left_padding=(42,), tile=(16, 16)),
    PrefillCase("prefill_blocks_not_causal", index_block=32, tokens=100, causal=False, window=None, dtype="float32"),
    PrefillCase("prefill_blocks_encoder", index_block=64, tokens=205, causal=False, window=None, mask="bool", group=1),
]


def run_prefill_case(case: PrefillCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(case.batch, heads, case.tokens, case.head_dim, generator=generator).to(DTYPES[case.dtype])

    q, k, v = random(case.kv_heads * case.group), random(case.kv_heads), random(case.kv_heads)
    mask = _mask(case, generator)
    index = _index(case, generator)
    marks = torch.tensor([1, 0, 1][: case.kv_heads], dtype=torch.int32) if case.head_windows else None
    expected = _results(reference.prefill_attention(case.spec(), q, k, v, mask, index, marks))
    if case.transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    moved = [None if x is None else x.to(device) for x in (q, k, v, mask, index, marks)]
    names = ["out", *(["lse"] if case.lse else []), *(["mass"] if case.mass else [])]
    widest = case.index_block & -case.index_block or 128
    small = {"block_m": min(case.tile[0], widest), "block_n": min(case.tile[1], widest), "warps": 4, "stages": 2}
    # A GPU also runs the tile of the launch tables, which is too large for the interpreter's patience.
    for tile in [small, *([{}] if device.type == "cuda" else [])]:
        got = _results(prefill_attention(case.spec(), **tile)(*moved))
        for name, x, y in zip(names, got, expected, strict=True):
            if found := difference(name, x.cpu(), y, TOLERANCE[case.dtype]):
                return f"{found}, with {tile or 'the tile of the tables'}"
    return None


def _results(got: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return got if isinstance(got, tuple) else (got,)


def _index(case: PrefillCase, generator: torch.Generator) -> Tensor | None:
    """Half of the blocks for each block of queries, in any order and after some -1; the last block of queries none."""
    if not case.index_block:
        return None
    blocks = -(-case.tokens // case.index_block)
    heads = case.kv_heads * case.group
    index = torch.full((case.batch, heads, blocks, blocks + 2), -1, dtype=torch.int32)
    for number, row in enumerate(index.flatten(0, 2)):
        if number % blocks == blocks - 1:
            continue
        named = torch.randperm(blocks, generator=generator)
        named = named[torch.rand(blocks, generator=generator) < 0.5].to(torch.int32)
        row[torch.randperm(blocks + 2, generator=generator)[: len(named)]] = named
    return index


def _mask(case: PrefillCase, generator: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    allowed = torch.rand(case.batch, 1, case.tokens, case.tokens, generator=generator) > 0.3
    for row, padding in enumerate(case.left_padding):
        allowed[row, ..., :padding] = False
        allowed[row, ..., padding : padding + 1] = True
    if case.mask == "bool":
        return allowed
    return torch.randn(allowed.shape, generator=generator).masked_fill(~allowed, -torch.inf)
