"""Check every Triton kernel against the reference on a CUDA GPU, then time it: one JSON line per case.

    python benchmarks/gpu_kernels.py [--batch 1] [--lengths 4096 32768] [--only int4] [--configs]

The first line describes the machine, with its measured copy bandwidth and bfloat16 GEMM rate. Times are medians of GPU
time with the L2 cache flushed before every run. ``roofline_ms`` is the bytes that a decode kernel must read over that
bandwidth, or the multiplications of a prefill over that rate, and ``roofline_fraction`` its share of the time taken.
``--configs`` checks and times every launch choice that the kernels offer, one line each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gpu_choices
import gpu_rows
import torch
import torch.nn.functional as F
from gpu_bench import HEAD_DIM, HEADS, KV_HEADS, Bench, compare, on_cpu, random
from torch import Tensor
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.spec import AttentionSpec, KVFormat
from torchaccel.kernels.triton import decode_attention, merge, window_prefill

DENSE = KVFormat("dense", "bfloat16", HEAD_DIM)


def main() -> int:
    """Run the cases that the command line asks for; 0 when every kernel agrees with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="batch rows of the decode cases")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 32768], help="cached tokens, and prompt lengths"
    )
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each kernel")
    parser.add_argument("--configs", action="store_true", help="every launch choice, not only that of the tables")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels.py times kernels on a CUDA GPU, and torch sees none on this machine", file=sys.stderr)
        return 2

    bench = Bench(options.runs)
    seed = torch.seed()
    print(json.dumps(bench.machine() | {"seed": seed}), flush=True)
    agreed = True
    for line in cases(bench, options.batch, options.lengths, options.only, options.configs):
        print(json.dumps(line), flush=True)
        agreed = agreed and line["agrees"]
    return 0 if agreed else 1


@dataclass(frozen=True)
class Decode:
    """A decode case: how the cache is stored, which keys are read, and what is asked for.

    ``share`` is the part of the blocks, or slots, that an index names. The cached tokens end ``beyond`` tokens after a
    block: at -1 the call quantises one, as one step in 64 does.
    """

    name: str
    keys: KVFormat = DENSE
    values: KVFormat = DENSE
    new: int = 1
    static: bool = False
    share: float = 1.0
    beyond: int = 32
    fields: tuple[tuple[str, Any], ...] = ()
    split: str = "kv"

    def spec(self) -> AttentionSpec:
        """The spec of the case."""
        return AttentionSpec(
            phase="decode",
            head_dim=HEAD_DIM,
            group=HEADS // KV_HEADS,
            dtype="bfloat16",
            key_format=self.keys,
            value_format=self.values,
            scale=HEAD_DIM**-0.5,
            causal=not self.static,
            mask="bool" if self.static else "none",
            **dict(self.fields),
        )


def kivi(kind: Any, group: int = 0, window: int = 0) -> dict[str, KVFormat]:
    """Keys with scales per channel, values with scales per token."""
    stored = replace(DENSE, kind=kind, group=group, window=window)
    return {"keys": replace(stored, axis="channel"), "values": replace(stored, packing="token")}


OTHER_AXES = {
    "keys": replace(DENSE, kind="int4", axis="token"),
    "values": replace(DENSE, kind="int4", axis="channel", packing="token"),
}
GEAR = {side: replace(fmt, rank=2, outliers=2) for side, fmt in kivi("int2", 64).items()}
TURBO = {side: replace(fmt, axis="token", codebook="gaussian") for side, fmt in kivi("int4").items()}
# A quarter of a key remains; the newest 64 tokens are exact.
LATENT = {"keys": replace(DENSE, kind="latent", rank=HEAD_DIM // 4, window=64)}
WINDOW = (("window", 1024), ("sinks", 4))
BLOCKS = (("index", "blocks"), ("index_block", 64))
DECODES = [
    Decode("decode_dense"),
    Decode("decode_dense_single", split="single"),
    Decode("decode_dense_stream", split="stream"),
    Decode("decode_dense_4_new_tokens", new=4),
    Decode("decode_int8", **kivi("int8")),
    Decode("decode_int8_stream", split="stream", **kivi("int8")),
    Decode("decode_int8_completes_a_block", beyond=-1, **kivi("int8")),
    Decode("decode_int4", **kivi("int4")),
    Decode("decode_int4_groups_of_32_window_64", **kivi("int4", 32, 64)),
    Decode("decode_int4_window_64_completes_a_block", beyond=-1, **kivi("int4", 32, 64)),
    Decode("decode_int4_other_axes", **OTHER_AXES),
    Decode("decode_int2", **kivi("int2")),
    Decode("decode_gear_int2", **GEAR),
    Decode("decode_gear_int2_completes_a_block", beyond=-1, **GEAR),
    Decode("decode_gear_tokens_16th", share=1 / 16, fields=(("index", "tokens"),), **GEAR),
    Decode("decode_turbo_int4", **TURBO),
    Decode("decode_turbo_int4_completes_a_block", beyond=-1, **TURBO),
    Decode("decode_latent_32", **LATENT),
    Decode("decode_latent_32_completes_a_block", beyond=-1, **LATENT),
    Decode("decode_latent_32_stream", split="stream", **LATENT),
    Decode("decode_window_1024_sinks_4", fields=WINDOW),
    Decode("decode_windows_of_half_the_heads", fields=(*WINDOW, ("head_windows", True))),
    Decode("decode_static_half_filled", static=True),
    Decode("decode_blocks_16th", share=1 / 16, fields=BLOCKS),
    Decode("decode_blocks_16th_stream", share=1 / 16, fields=BLOCKS, split="stream"),
    Decode("decode_blocks_16th_int4", share=1 / 16, fields=BLOCKS, **kivi("int4")),
    Decode("decode_tokens_16th", share=1 / 16, fields=(("index", "tokens"),)),
    Decode("decode_tokens_16th_int4", share=1 / 16, fields=(("index", "tokens"),), **kivi("int4")),
    Decode("decode_lse_mass", fields=(("lse", True), ("mass", True))),
    Decode("decode_lse_mass_int4", fields=(("lse", True), ("mass", True)), **kivi("int4")),
]
# Name, fields of the spec, and the share of the blocks of 64 below the diagonal that a list names.
PREFILLS: list[tuple[str, dict[str, Any], float]] = [
    ("prefill_causal", {}, 1.0),
    ("prefill_window_1024_sinks_4", dict(WINDOW), 1.0),
    ("prefill_blocks_15_percent", {"index": "blocks", "index_block": 64}, 0.15),
    ("prefill_blocks_of_128_15_percent", {"index": "blocks", "index_block": 128}, 0.15),
    ("prefill_lse_mass", {"lse": True, "mass": True}, 1.0),
]


def cases(bench: Bench, batch: int, lengths: list[int], only: str, every: bool) -> Iterator[dict[str, Any]]:
    """Results of every case whose name contains ``only``, with the tables' launch choices or ``every`` one."""
    for length in lengths:
        for case in DECODES:
            if only in case.name:
                yield from decode(bench, case, batch, length, every)
        for name, fields, share in PREFILLS:
            if only in name:
                yield from prefill(bench, name, fields, share, length, every)
        yield from gpu_choices.cases(bench, batch, length, only)
    yield from gpu_rows.cases(bench, batch, only)
    if only in "merge_8":
        yield merge_of_8(bench, batch)


def decode(bench: Bench, case: Decode, batch: int, length: int, every: bool) -> Iterator[dict[str, Any]]:
    """Check and time one decode case over ``length`` cached tokens, next to torch's attention over the same tokens."""
    spec, new = case.spec(), case.new
    length = length // 64 * 64 - 64 + case.beyond % 64
    q = random(batch, HEADS, new)
    formats = spec.key_format, spec.value_format
    k, v = (random(batch, KV_HEADS, length, fmt.width) for fmt in formats)
    k_new, v_new = (None, None) if case.static else (random(batch, KV_HEADS, new, fmt.width) for fmt in formats)
    buffers = []
    for fmt, rows in zip(formats, (k, v), strict=True):
        buffers.append(kv_format.allocate(fmt, batch, KV_HEADS, length + 64, q.device))
        kv_format.append(fmt, buffers[-1], 0, rows)
    lens = torch.tensor([0, length, length])
    mask = None
    if case.static:
        mask = torch.arange(length, device="cuda")[None, None, None, :] < length // 2
    index, visible = None, length // 2 if case.static else length
    if spec.index != "contiguous":
        entries = -(-length // 64) if spec.index == "blocks" else length
        index = sample((batch, KV_HEADS), entries, max(1, int(entries * case.share)))
        visible = index.shape[2] * (64 if spec.index == "blocks" else 1)
    seen = visible if spec.window is None else min(length, spec.window + spec.sinks)
    windows = torch.arange(KV_HEADS, device="cuda", dtype=torch.int32) % 2 if spec.head_windows else None
    tokens = (seen + length) / 2 if spec.head_windows else seen
    read = batch * KV_HEADS * tokens * (spec.key_format.token_bytes + spec.value_format.token_bytes)
    if spec.mass:
        read += batch * KV_HEADS * tokens * (spec.key_format.token_bytes + 4)

    rest = (lens, mask, None, index, windows, None, None, *rebuilding(spec.key_format, length + new))
    rebuilt = 2 * batch * tokens * HEAD_DIM * KV_HEADS**2 * spec.key_format.rank if rest[-1] is not None else 0
    inputs = (q, k_new, v_new, *buffers, *rest)
    expected = reference.decode_attention(spec, *on_cpu(*inputs))
    # torch gets what it reads for free: the same number of keys, contiguous, without the append.
    k_seen, v_seen = k[:, :, -seen:, :HEAD_DIM].contiguous(), v[:, :, -seen:].contiguous()
    sdpa = bench.ms(lambda: F.scaled_dot_product_attention(q, k_seen, v_seen, enable_gqa=True))
    found = decode_attention.configs(spec) if every else ((("split", case.split),),)
    for config in found:
        run = decode_attention.decode_attention(spec, **dict(config))
        stored = [x.clone() for x in buffers]
        called = (q, k_new, v_new, *stored, *rest)
        agreement = compare(run(*called), expected)
        # Timed where it was checked: appending the same tokens again changes nothing but a completed block's tail.
        ms = bench.ms(lambda run=run, called=called: run(*called))
        line = {"kind": case.name, "batch": batch, "length": length, "config": dict(config), **agreement}
        line |= bench.roofline(ms, read=read, flops=rebuilt)
        yield line | {"sdpa_ms": sdpa, "launch_us": bench.launch_us(lambda run=run, called=called: run(*called))}


def rebuilding(fmt: KVFormat, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """A projection and a rotary table for latent keys."""
    if fmt.kind != "latent":
        return None, None
    size = KV_HEADS * fmt.rank
    projection = (torch.randn(KV_HEADS, size, HEAD_DIM, device="cuda") / size**0.5).bfloat16()
    speeds = torch.logspace(0, -4, HEAD_DIM // 2, device="cuda").repeat(2)
    angles = torch.arange(columns, device="cuda")[None, :, None] * speeds
    return projection, torch.stack([angles.cos(), angles.sin()])


def prefill(
    bench: Bench, name: str, fields: dict[str, Any], share: float, length: int, every: bool
) -> Iterator[dict[str, Any]]:
    """Check one prefill case on 1024 tokens with a narrower window, then time it on ``length`` tokens."""
    spec = AttentionSpec(
        phase="prefill",
        head_dim=HEAD_DIM,
        group=HEADS // KV_HEADS,
        dtype="bfloat16",
        key_format=DENSE,
        value_format=DENSE,
        scale=HEAD_DIM**-0.5,
        **fields,
    )
    narrow = spec if spec.window is None else replace(spec, window=200)
    small = (random(1, HEADS, 1024), random(1, KV_HEADS, 1024), random(1, KV_HEADS, 1024), None)
    small += (lower_blocks(spec, 1024, max(share, 0.5)),)
    expected = reference.prefill_attention(narrow, *on_cpu(*small))
    q, k, v = random(1, HEADS, length), random(1, KV_HEADS, length), random(1, KV_HEADS, length)
    index = lower_blocks(spec, length, share)
    seen = length * (length + 1) / 2
    if spec.window is not None and length > spec.window + spec.sinks:
        hidden = length - spec.window - spec.sinks
        seen -= hidden * (hidden + 1) / 2
    if index is not None:
        # Whole blocks, half of which the diagonal cuts in those that lie on it.
        listed = float((index >= 0).sum()) / HEADS
        seen = (listed - index.shape[2] / 2) * spec.index_block**2
    sdpa = bench.ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    # The scores are computed once more for the mass.
    flops = (6 if spec.mass else 4) * HEADS * HEAD_DIM * seen
    for config in window_prefill.configs(spec) if every else ((),):
        agreement = compare(window_prefill.prefill_attention(narrow, **dict(config))(*small), expected)
        run = window_prefill.prefill_attention(spec, **dict(config))
        ms = bench.ms(lambda run=run: run(q, k, v, None, index))
        line = {"kind": name, "batch": 1, "length": length, "config": dict(config), **agreement}
        yield line | bench.roofline(ms, flops=flops) | {"sdpa_causal_ms": sdpa, "tflops": flops / ms / 1e9}


def merge_of_8(bench: Bench, batch: int) -> dict[str, Any]:
    """Check and time the merge of 8 partial results of 64 queries."""
    parts = [(random(batch, HEADS, 64), torch.randn(batch, HEADS, 64, device="cuda")) for _ in range(8)]
    expected = reference.merge([(out.cpu(), lse.cpu()) for out, lse in parts])
    agreement = compare(merge.merge(parts), expected)
    read = 9 * batch * HEADS * 64 * (2 * HEAD_DIM + 4)
    ms = bench.ms(lambda: merge.merge(parts))
    return {"kind": "merge_8", "batch": batch, **agreement} | bench.roofline(ms, read=read)


def sample(shape: tuple[int, ...], entries: int, count: int) -> Tensor:
    """For each of ``shape``, ``count`` different numbers below ``entries``, ascending: int32 on the GPU."""
    chosen = torch.rand(*shape, entries, device="cuda").topk(count, -1).indices
    return chosen.sort(-1).values.to(torch.int32)


def lower_blocks(spec: AttentionSpec, tokens: int, share: float) -> Tensor | None:
    """For every block of queries its own block and ``share`` of those before it: int32 ``[1, H, S / block, N]``."""
    if spec.index != "blocks":
        return None
    blocks = -(-tokens // spec.index_block)
    index = torch.full((1, HEADS, blocks, blocks), -1, dtype=torch.int32)
    for row in range(blocks):
        count = int(row * share)
        for h in range(HEADS):
            index[0, h, row, :count] = torch.randperm(row)[:count].sort().values
        index[0, :, row, count] = row
    return index[..., : int(blocks * share) + 1].cuda()


if __name__ == "__main__":
    sys.exit(main())
