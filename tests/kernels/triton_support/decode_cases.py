"""Decode attention cases: inputs with poisoned unused memory, the expected result, and the check of both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torchaccel.kernels import kv_format, reference, registry
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat
from torchaccel.kernels.triton.decode_attention import decode_attention

Kind = Literal["dense", "int8", "int4", "int2", "latent"]
Axis = Literal["channel", "token"]

# Largest difference from the float32 reference, per unit of the largest expected value: rounding of the output and of
# the probabilities (bfloat16 keeps 8 bits, float16 11), sums in another order (float32).
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}


@dataclass(frozen=True)
class DecodeCase:
    """One call: ``spec`` fields, and live slots ``start .. end`` before ``new`` tokens come.

    ``listed`` is the share of the blocks, or slots, that an index names. ``turned``: channels of rebuilt keys that are
    rotated. ``registered``: as a model calls it, through the registry, which turns tokens for Gaussian codebooks.
    """

    name: str
    head_dim: int = 64
    group: int = 4
    dtype: str = "bfloat16"
    keys: Kind = "dense"
    values: Kind = "dense"
    key_axis: Axis = "channel"
    value_axis: Axis = "token"
    key_group: int = 0
    value_group: int = 0
    key_rank: int = 0
    value_rank: int = 0
    key_outliers: int = 0
    value_outliers: int = 0
    codebook: Literal["uniform", "gaussian"] = "uniform"
    turned: int = 0
    block: int = 64
    tail: int = 0
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
    head_positions: bool = False
    head_windows: bool = False
    index: Literal["contiguous", "blocks", "tokens"] = "contiguous"
    index_block: int = 64
    listed: float = 0.5
    lse: bool = False
    mass: bool = False
    batch: int = 2
    kv_heads: int = 2
    start: int = 0
    end: int = 150
    evicted: int = 0
    new: int = 1
    append: bool = True
    split: Literal["kv", "stream", "single"] = "kv"
    splits: int | None = 2
    block_n: int | None = None
    transposed: bool = False
    rotary: Literal["none", "half", "interleaved"] = "none"
    rotary_dim: int = 0
    registered: bool = False

    def spec(self) -> AttentionSpec:
        """The attention spec of the case."""
        stored: dict[str, Any] = {"dtype": self.dtype, "head_dim": self.head_dim, "block": self.block}
        stored["window"] = self.tail
        coded = {
            kind: {"codebook": self.codebook} if kind.startswith("int") else {} for kind in (self.keys, self.values)
        }
        keys = {"axis": self.key_axis, "group": self.key_group, "rank": self.key_rank, "outliers": self.key_outliers}
        values = {"axis": self.value_axis, "group": self.value_group, "rank": self.value_rank}
        values |= {"outliers": self.value_outliers, "packing": "token"}
        return AttentionSpec(
            phase="decode",
            head_dim=self.head_dim,
            group=self.group,
            dtype=self.dtype,
            key_format=KVFormat(self.keys, **stored, **keys, **coded[self.keys]),
            value_format=KVFormat(self.values, **stored, **values, **coded[self.values]),
            scale=self.scale,
            causal=self.causal,
            softcap=self.softcap,
            mask=self.mask,
            window=self.window,
            sinks=self.sinks,
            positions=self.positions,
            head_windows=self.head_windows,
            index=self.index,
            index_block=self.index_block,
            lse=self.lse,
            mass=self.mass,
            rotary=self.rotary,
            rotary_dim=self.rotary_dim,
        )


_GEAR: dict[str, Any] = {"keys": "int2", "values": "int2", "key_rank": 2, "value_rank": 2}
_OUTLIERS: dict[str, Any] = {"key_outliers": 2, "value_outliers": 2}
_TURBO: dict[str, Any] = {"keys": "int4", "values": "int2", "key_axis": "token", "codebook": "gaussian"}
_LATENT: dict[str, Any] = {"keys": "latent", "key_rank": 16, "turned": 64, "tail": 16, "end": 300}
# Corrections, codebooks and latents.
FORMAT_CASES = [
    DecodeCase("gear_bfloat16", **_GEAR, **_OUTLIERS, key_group=32, tail=20, end=300),
    DecodeCase("gear_completes", **_GEAR, **_OUTLIERS, end=127, dtype="float32", new=3),
    DecodeCase(
        "gear_completes_groups_of_channels",
        keys="int4",
        values="int8",
        key_axis="token",
        key_group=8,
        value_axis="channel",
        value_group=16,
        key_rank=3,
        value_rank=1,
        key_outliers=4,
        value_outliers=10,
        head_dim=24,
        tail=6,
        end=130,
        new=5,
        dtype="float32",
        lse=True,
    ),
    DecodeCase("gear_weird_head", **_GEAR, key_outliers=16, head_dim=42, group=3, end=123, new=6, dtype="float16"),
    DecodeCase("gear_low_rank_only", **_GEAR, key_group=16, end=200, window=70, sinks=6, mask="bool", split="stream"),
    DecodeCase("gear_outliers_only", keys="int2", values="int4", **_OUTLIERS, end=191, mass=True, dtype="float32"),
    DecodeCase(
        "gear_blocks", **_GEAR, **_OUTLIERS, index="blocks", index_block=32, end=260, dtype="float32", mass=True
    ),
    DecodeCase("gear_tokens", **_GEAR, **_OUTLIERS, index="tokens", key_group=16, tail=20, end=300, head_dim=80),
    DecodeCase(
        "gear_tokens_groups_of_channels",
        keys="int2",
        values="int4",
        key_axis="token",
        key_group=16,
        value_axis="channel",
        key_rank=5,
        value_rank=2,
        **_OUTLIERS,
        index="tokens",
        end=260,
        new=2,
        dtype="float32",
    ),
    DecodeCase("gear_keys_in_parts", keys="int8", key_rank=1, end=60, new=20, batch=1, positions=True, evicted=5),
    DecodeCase(
        "gear_wide_completes", **_GEAR, **_OUTLIERS, head_dim=250, block=128, group=1, end=127, batch=1, kv_heads=1
    ),
    DecodeCase("turbo_bfloat16", **_TURBO, end=300, new=2),
    DecodeCase("turbo_completes", **_TURBO, tail=6, end=133, dtype="float32", group=3),
    DecodeCase("turbo_weird_head", **_TURBO, head_dim=42, end=123, new=6, dtype="float32", positions=True, evicted=9),
    DecodeCase("turbo_groups_complete", **_TURBO, key_group=8, value_group=8, head_dim=24, end=190, new=5, lse=True),
    DecodeCase("turbo_tokens", **_TURBO, value_group=32, index="tokens", end=300, dtype="float32", split="stream"),
    DecodeCase("turbo_blocks_mass", **_TURBO, index="blocks", end=255, new=3, dtype="float32", mass=True),
    DecodeCase("turbo_registered", **_TURBO, end=200, registered=True, rotary="half", rotary_dim=10, dtype="float32"),
    DecodeCase("latent_bfloat16", **_LATENT, lse=True),
    DecodeCase(
        "latent_weird", **_LATENT | {"key_rank": 7, "turned": 10, "tail": 0}, head_dim=42, group=3, dtype="float32"
    ),
    DecodeCase("latent_completes", **_LATENT | {"end": 143}, values="int8", new=3, dtype="float32", mass=True),
    DecodeCase("latent_without_rotary", **_LATENT | {"turned": 0, "end": 79}, kv_heads=3, new=2, dtype="float32"),
    DecodeCase("latent_rotates", **_LATENT, rotary="half", rotary_dim=32, positions=True, evicted=9, dtype="float32"),
    DecodeCase("latent_blocks", **_LATENT, index="blocks", index_block=32, start=42, mask="additive", dtype="float32"),
    DecodeCase("latent_tokens", **_LATENT, values="int4", value_rank=2, index="tokens", new=2, dtype="float32"),
    DecodeCase("latent_stream", **_LATENT | {"turned": 32}, split="stream", window=90, sinks=6, dtype="float16"),
    DecodeCase("latent_in_parts", **_LATENT | {"end": 60}, new=20, batch=1, mask="bool", dtype="float32"),
    DecodeCase("latent_static", **_LATENT, append=False, mask="bool", left_padding=(0, 6), block_n=32),
]

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
    DecodeCase("head_positions", positions=True, head_positions=True, evicted=50, new=2, mask="bool"),
    DecodeCase("int8_head_positions", keys="int8", values="int8", positions=True, head_positions=True, evicted=9),
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
    # Formats: bits, axes, groups, windows.
    DecodeCase("int4", keys="int4", values="int4", key_group=32, value_group=32, tail=42, end=300),
    DecodeCase("int2", keys="int2", values="int2", key_group=32, dtype="float32", tail=32, end=250, head_dim=80),
    DecodeCase("int4_token_keys", keys="int4", values="int4", key_axis="token", value_axis="channel", end=250),
    DecodeCase(
        "int2_groups_of_channels",
        keys="int2",
        values="int4",
        key_axis="token",
        key_group=16,
        value_group=16,
        head_dim=80,
        dtype="float32",
        group=3,
        end=200,
    ),
    DecodeCase(
        "int8_value_groups_of_tokens", values="int8", value_axis="channel", value_group=16, end=170, group=3, new=2
    ),
    DecodeCase(
        "int4_moves_the_tail_down", keys="int4", values="int2", key_group=16, tail=100, end=222, new=9, dtype="float32"
    ),
    DecodeCase(
        "int2_completes_groups_of_channels",
        keys="int2",
        values="int8",
        key_axis="token",
        key_group=8,
        value_axis="channel",
        value_group=32,
        head_dim=24,
        tail=6,
        end=130,
        new=5,
    ),
    DecodeCase(
        "int8_completes_wide_tokens", keys="int8", values="int2", key_axis="token", head_dim=42, end=63, dtype="float32"
    ),
    DecodeCase("int4_block_of_128", keys="int4", values="int4", block=128, tail=20, end=275, head_dim=128, new=2),
    DecodeCase("int4_small_blocks", keys="int4", values="int4", block=16, tail=6, end=85, new=4, dtype="float32"),
    DecodeCase("int2_window_sinks", keys="int2", values="int2", window=90, sinks=6, tail=30, end=300, mask="bool"),
    # Lists of blocks and of slots.
    DecodeCase("blocks", index="blocks", end=500, new=2, group=3),
    DecodeCase("blocks_small", index="blocks", index_block=16, end=333, start=42, dtype="float32"),
    DecodeCase("blocks_odd", index="blocks", index_block=48, end=200, mask="additive", dtype="float32", window=120),
    DecodeCase("blocks_int4", index="blocks", keys="int4", values="int4", tail=123, end=400, key_group=32),
    DecodeCase("blocks_of_32_int8", index="blocks", index_block=32, keys="int8", values="int8", end=255, new=4),
    DecodeCase("blocks_none", index="blocks", listed=0.0, end=123),
    DecodeCase("blocks_static", index="blocks", append=False, mask="bool", end=300),
    DecodeCase("blocks_in_parts", index="blocks", keys="int8", values="int8", end=120, new=20, batch=1),
    DecodeCase("tokens", index="tokens", end=300, new=3, group=3),
    DecodeCase("tokens_positions_window", index="tokens", end=200, positions=True, evicted=9, window=99, sinks=4),
    DecodeCase("tokens_int4", index="tokens", keys="int4", values="int2", key_group=32, tail=20, end=300, head_dim=80),
    DecodeCase(
        "tokens_int2",
        index="tokens",
        keys="int2",
        values="int8",
        key_axis="token",
        value_axis="channel",
        end=260,
        dtype="float32",
    ),
    DecodeCase(
        "tokens_int8_completes", index="tokens", keys="int8", values="int4", value_group=32, end=123, new=9, listed=0.2
    ),
    DecodeCase("tokens_in_parts", index="tokens", end=90, new=17, batch=1, dtype="float32", mass=True, lse=True),
    # Heads with and without the window.
    DecodeCase("head_windows", head_windows=True, window=40, sinks=4, end=300, kv_heads=3, new=2),
    DecodeCase(
        "head_windows_int8", head_windows=True, window=70, keys="int8", values="int8", end=400, kv_heads=3, batch=1
    ),
    DecodeCase("head_windows_positions", head_windows=True, window=40, positions=True, evicted=9, mask="bool"),
    # Ways to split.
    DecodeCase("stream", split="stream", end=700, kv_heads=3, group=2, lse=True),
    DecodeCase("stream_one_program_each", split="stream", end=200, kv_heads=1, dtype="float32"),
    DecodeCase("stream_empty_cache", split="stream", end=0, new=3, dtype="float32", lse=True),
    DecodeCase("stream_int4", split="stream", keys="int4", values="int4", end=900, tail=64, kv_heads=3, block_n=32),
    DecodeCase(
        "stream_sides", split="stream", index="blocks", keys="int8", values="int8", end=1500, listed=0.9, mass=True
    ),
    DecodeCase(
        "stream_head_windows", split="stream", head_windows=True, window=70, sinks=6, end=800, kv_heads=3, lse=True
    ),
    DecodeCase("single", split="single", splits=None, end=300, keys="int8", values="int8", lse=True, dtype="float32"),
    # Log-sum-exp and mass.
    DecodeCase("sides", lse=True, mass=True, end=300, new=5, mask="bool", left_padding=(0, 1000)),
    DecodeCase("sides_additive", lse=True, mass=True, mask="additive", left_padding=(0, 1000), dtype="float32"),
    DecodeCase("mass_only", mass=True, splits=1, end=300, start=42, softcap=9.0, dtype="float32", group=3),
    DecodeCase("mass_int4", mass=True, keys="int4", values="int4", tail=70, end=197, window=123, sinks=6),
    DecodeCase("mass_tokens", mass=True, index="tokens", keys="int8", values="dense", end=191, dtype="float32"),
    DecodeCase("mass_completes", mass=True, lse=True, index="blocks", keys="int8", values="int8", end=120, new=12),
    # Rotary embedding of queries and new keys.
    DecodeCase("rotary", rotary="half", rotary_dim=64, transposed=True, mask="bool", left_padding=(0, 70), new=2),
    DecodeCase("rotary_partial", rotary="half", rotary_dim=10, head_dim=42, group=3, dtype="float32", end=123, new=6),
    DecodeCase("rotary_pairs", rotary="interleaved", rotary_dim=64, dtype="float16", split="stream", end=300),
    DecodeCase("rotary_int8", rotary="interleaved", rotary_dim=24, keys="int8", values="int8", end=123, new=3),
    DecodeCase("rotary_int8_completes", rotary="half", rotary_dim=64, keys="int8", values="int8", end=123, new=9),
    DecodeCase("rotary_in_parts", rotary="half", rotary_dim=16, head_dim=16, new=30, end=42, batch=1, dtype="float32"),
    DecodeCase(
        "rotary_positions_mass", rotary="half", rotary_dim=32, positions=True, evicted=9, mass=True, dtype="float32"
    ),
    *FORMAT_CASES,
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
    formats = spec.key_format, spec.value_format
    k_new, v_new = (random(case.batch, case.kv_heads, case.new, fmt.width) for fmt in formats)
    k_full, v_full = (_filled(case, fmt, random(case.batch, case.kv_heads, case.end, fmt.width)) for fmt in formats)
    logical = case.end - case.start + case.evicted
    lens = torch.tensor([case.start, case.end, logical])
    positions = None
    if case.positions:
        # Some columns were evicted: the stored ones are increasing with gaps, and differ between batch rows.
        heads_apart = case.kv_heads if case.head_positions else 1
        positions = torch.full((case.batch + 1, heads_apart, case.end + case.new + 70), -1, dtype=torch.int32)
        for row in positions[: case.batch].flatten(0, 1):
            kept = torch.randperm(logical, generator=generator)[: case.end].sort().values
            row[: case.end] = kept.to(torch.int32)
    mask = _mask(case, logical + case.new if case.append else case.end - case.start, generator)

    index = _index(case, generator)
    head_windows = torch.tensor([1, 0, 1][: case.kv_heads], dtype=torch.int32) if case.head_windows else None

    cos, sin = _tables(case, generator)
    inputs = [q, k_new, v_new, k_full, v_full, mask, positions, index, head_windows, cos, sin]
    inputs += _rebuilding(case, logical + case.new, generator)
    # clone() keeps strides.
    moved = [None if x is None else x.clone().to(device) for x in inputs]
    if case.transposed:
        moved[:2] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in moved[:2]]
    if moved[5] is not None and moved[5].dtype == torch.bool:
        # Every second column of a wider mask: a stride other than 1, and wrong answers for who ignores it.
        moved[5] = torch.stack([moved[5], ~moved[5]], -1).flatten(-2)[..., ::2]
    expected = _expected(case, spec, inputs, lens)
    got = _run(case, spec, moved, lens)
    if any(x.device.type != device.type for x in got):
        return f"the results are not on the device {device}"
    return _difference(case, expected, got, inputs, moved)


def _tables(case: DecodeCase, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin in float32, of which only every second channel counts; one row for all sequences where Q is even."""
    if case.rotary == "none":
        return None, None
    rows = case.batch if case.new % 2 else 1
    both = torch.randn(2, rows, case.new, 2 * case.rotary_dim, generator=generator)[..., ::2]
    return both[0], both[1]


def _rebuilding(case: DecodeCase, columns: int, generator: torch.Generator) -> list[Tensor | None]:
    """The projection of latents, and a table of angles with room to spare; one for all sequences where Q is even."""
    if case.keys != "latent":
        return [None, None]
    size = case.kv_heads * case.key_rank
    projection = torch.randn(case.kv_heads, size, case.head_dim, generator=generator).to(DTYPES[case.dtype])
    if case.turned == 0:
        return [projection / size**0.5, None]
    angles = 7 * torch.randn(case.batch if case.new % 2 else 1, columns, case.turned, generator=generator)
    table = torch.nn.functional.pad(torch.stack([angles.cos(), angles.sin()]), (0, 0, 0, 5), value=torch.nan)
    return [projection / size**0.5, table]


def _index(case: DecodeCase, generator: torch.Generator) -> Tensor | None:
    """A list for each batch row and KV head, in any order, of different lengths, among entries that are none."""
    if case.index == "contiguous":
        return None
    size = case.index_block if case.index == "blocks" else 1
    numbers = -(-(case.end + (case.new if case.append else 0)) // size)
    # Lists of a KV head side by side: strides that differ from those of a contiguous index.
    index = torch.full((case.kv_heads, case.batch, numbers + 3), -1, dtype=torch.int32).transpose(0, 1)
    for row in (index[b, h] for b in range(case.batch) for h in range(case.kv_heads)):
        named = torch.randperm(numbers, generator=generator)
        named = named[torch.rand(numbers, generator=generator) < case.listed].to(torch.int32)
        row[torch.randperm(len(row), generator=generator)[: len(named)]] = named
    return index


def _run(case: DecodeCase, spec: AttentionSpec, moved: list[Any], lens: Tensor) -> tuple[Tensor, ...]:
    q, k_new, v_new, k_full, v_full, mask, positions, index, head_windows, *tables = moved
    choices = {"split": case.split, "splits": case.splits, "block_n": case.block_n}
    choices = {name: choice for name, choice in choices.items() if choice is not None}
    columns = None if positions is None else positions[: case.batch]
    new = (k_new, v_new) if case.append else (None, None)
    run = _registered(spec, "triton", choices) if case.registered else decode_attention(spec, **choices)
    buffers = k_full[: case.batch], v_full[: case.batch]
    got = run(q, *new, *buffers, lens, mask, columns, index, head_windows, *tables)
    return got if isinstance(got, tuple) else (got,)


def _registered(spec: AttentionSpec, implementation: Any, choices: dict[str, Any]) -> Any:
    candidate = Candidate(implementation, tuple(sorted(choices.items())))
    return registry.attend(Plan(spec, ((None, candidate),)).key())


def _expected(case: DecodeCase, spec: AttentionSpec, inputs: list[Any], lens: Tensor) -> tuple[Tensor, ...]:
    q, k_new, v_new, k_full, v_full, mask, positions, index, head_windows, *tables = inputs
    k, v = k_full[: case.batch], v_full[: case.batch]
    rows = None if positions is None else positions[: case.batch]
    new = (k_new, v_new) if case.append else (None, None)
    run = _registered(spec, "reference", {}) if case.registered else partial(reference.decode_attention, spec)
    got = run(q, *new, k, v, lens, mask, rows, index, head_windows, *tables)
    return got if isinstance(got, tuple) else (got,)


def _difference(
    case: DecodeCase, expected: tuple[Tensor, ...], got: tuple[Tensor, ...], inputs: list[Any], moved: list[Any]
) -> str | None:
    for name, before, after in zip(("keys", "values"), inputs[3:5], moved[3:5], strict=True):
        if case.registered and after.is_cuda:
            continue  # a GPU turns tokens by a product that sums in another order
        if name == "keys" and case.rotary != "none" and after.is_cuda:
            continue  # a GPU contracts the two products of a rotation: the last bit may differ, as attention will show
        if not torch.equal(before.view(torch.uint8), after.cpu().view(torch.uint8)):
            return f"the {name} buffer differs from the reference's"
    if case.positions and not torch.equal(inputs[6], moved[6].cpu()):
        return "the positions differ from the reference's"
    if len(got) != len(expected):
        return f"expected {len(expected)} results, found {len(got)}"
    names = ["out", *(["lse"] if case.lse else []), *(["mass"] if case.mass else [])]
    differences = [
        difference(name, x.cpu(), y, TOLERANCE[case.dtype]) for name, x, y in zip(names, got, expected, strict=True)
    ]
    return next(filter(None, differences), None)


def difference(name: str, got: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """How ``got`` differs from ``expected`` beyond ``tolerance`` times the largest finite value, or None."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{name}: expected {expected.dtype} {tuple(expected.shape)}, found {got.dtype} {tuple(got.shape)}"
    infinite = torch.isinf(expected)
    if not torch.equal(got[infinite], expected[infinite]):
        return f"{name}: infinite where the reference is not, or the reverse"
    error = (got.float() - expected.float()).masked_fill(infinite, 0).abs().max()
    bound = tolerance * expected.float().masked_fill(infinite, 0).abs().max()
    return None if error <= bound else f"{name}: largest error {error:.3g}, allowed {bound:.3g}"
