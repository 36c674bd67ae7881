"""Check every Triton kernel against the reference on a CUDA GPU, then time it: one JSON line per case.

    python benchmarks/gpu_kernels.py [--batch 1] [--lengths 4096 32768] [--only dense]

The first line describes the machine, with its measured copy bandwidth. Times are medians of GPU time with the L2 cache
flushed before every run; ``bandwidth_fraction`` compares the bytes a decode kernel must read with that copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.spec import AttentionSpec, KVFormat
from torchaccel.kernels.triton import decode_attention, window_prefill

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Rounding of the probabilities and of the result to bfloat16, per unit of the largest expected value.
TOLERANCE = 1.6e-2


def main() -> int:
    """Run the cases that the command line asks for; 0 when every kernel agrees with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="batch rows of the decode cases")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 32768], help="cached tokens, and prompt lengths"
    )
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each kernel")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels.py times kernels on a CUDA GPU, and torch sees none on this machine", file=sys.stderr)
        return 2

    bench = Bench(options.runs)
    seed = torch.seed()
    print(json.dumps(bench.machine() | {"seed": seed}), flush=True)
    agreed = True
    for line in cases(bench, options.batch, options.lengths, options.only):
        print(json.dumps(line), flush=True)
        agreed = agreed and line["agrees"]
    return 0 if agreed else 1


class Bench:
    """A clock for GPU work on a cold L2 cache."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        properties = torch.cuda.get_device_properties(0)
        self.flush = torch.empty(max(256 << 20, 4 * properties.L2_cache_size), dtype=torch.uint8, device="cuda")
        self.copy_bandwidth = self._measure_copy()

    def ms(self, run: Callable[[], Any]) -> float:
        """Median GPU time of ``run`` in milliseconds, after three calls that warm up and compile."""
        for _ in range(3):
            run()
        times = []
        for _ in range(self.runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The flush keeps the GPU busy while the CPU queues the launches, so their cost is not in the time.
            self.flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def launch_us(self, run: Callable[[], Any], calls: int = 100) -> float:
        """CPU time of queueing one call of ``run``, in microseconds."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        elapsed = time.perf_counter() - began
        torch.cuda.synchronize()
        return elapsed / calls * 1e6

    def machine(self) -> dict[str, Any]:
        """What the times below were taken on."""
        return {
            "kind": "machine",
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
            "copy_gbs": round(self.copy_bandwidth / 1e9, 1),
        }

    def _measure_copy(self) -> float:
        """Bytes read and written per second by a large copy."""
        size = 1 << 30
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2 * size / (self.ms(lambda: target.copy_(source)) / 1e3)


@dataclass(frozen=True)
class Decode:
    """A decode case: how the cache is stored and which keys are seen."""

    name: str
    int8: bool = False
    window: int | None = None
    sinks: int = 0
    new: int = 1
    static: bool = False

    def spec(self) -> AttentionSpec:
        """The spec of the case."""
        dense = KVFormat("dense", "bfloat16", HEAD_DIM)
        return AttentionSpec(
            phase="decode",
            head_dim=HEAD_DIM,
            group=HEADS // KV_HEADS,
            dtype="bfloat16",
            key_format=replace(dense, kind="int8", axis="channel") if self.int8 else dense,
            value_format=replace(dense, kind="int8", axis="token") if self.int8 else dense,
            scale=HEAD_DIM**-0.5,
            causal=not self.static,
            mask="bool" if self.static else "none",
            window=self.window,
            sinks=self.sinks,
        )


DECODES = [
    Decode("decode_dense"),
    Decode("decode_dense_4_new_tokens", new=4),
    Decode("decode_int8", int8=True),
    Decode("decode_window_1024_sinks_4", window=1024, sinks=4),
    Decode("decode_static_half_filled", static=True),
]


def cases(bench: Bench, batch: int, lengths: list[int], only: str) -> Iterator[dict[str, Any]]:
    """Results of every case whose name contains ``only``."""
    for length in lengths:
        for case in DECODES:
            if only in case.name:
                yield decode(bench, case, batch, length)
        for window, sinks in ((None, 0), (1024, 4)):
            name = "prefill_causal" if window is None else f"prefill_window_{window}_sinks_{sinks}"
            if only in name:
                yield prefill(bench, name, length, window, sinks)


def decode(bench: Bench, case: Decode, batch: int, length: int) -> dict[str, Any]:
    """Check and time one decode case over ``length`` cached tokens, next to torch's attention over the same tokens."""
    spec, new = case.spec(), case.new
    # Off the block boundary: the step that completes an int8 block is one in 64.
    length -= 32
    q = random(batch, HEADS, new)
    k, v = random(batch, KV_HEADS, length), random(batch, KV_HEADS, length)
    k_new, v_new = random(batch, KV_HEADS, new), random(batch, KV_HEADS, new)
    buffers = []
    for fmt, rows in ((spec.key_format, k), (spec.value_format, v)):
        buffers.append(kv_format.allocate(fmt, batch, KV_HEADS, length + 64, q.device))
        kv_format.append(fmt, buffers[-1], 0, rows)
    run = decode_attention.decode_attention(spec)
    lens = torch.tensor([0, length, length])
    mask = None
    if case.static:
        mask = torch.arange(length, device="cuda")[None, None, None, :] < length // 2

    def ours() -> Tensor:
        appended = (None, None) if case.static else (k_new, v_new)
        return run(q, *appended, *buffers, lens, mask)

    if case.static:
        columns = torch.arange(length).expand(batch, -1)
        queries = torch.arange(length, length + new)
        expected = reference.attend(spec, *on_cpu(q, k, v), columns, queries, mask.cpu() if mask is not None else None)
    else:
        expected = reference.decode_attention(spec, *on_cpu(q, k_new, v_new, *buffers), lens, None, None)
    agreement = compare(ours(), expected)

    seen = length if case.window is None else min(length, case.window + case.sinks)
    visible = length // 2 if case.static else seen
    sizes = [
        f.block_bytes / f.block if f.kind == "int8" else 2 * f.head_dim for f in (spec.key_format, spec.value_format)
    ]
    bytes_read = batch * KV_HEADS * visible * sum(sizes)
    ms = bench.ms(ours)
    # torch gets what it reads for free: the same keys, contiguous, without the append.
    k_seen, v_seen = k[:, :, -visible:].contiguous(), v[:, :, -visible:].contiguous()
    sdpa = bench.ms(lambda: F.scaled_dot_product_attention(q, k_seen, v_seen, enable_gqa=True))
    eager = bench.ms(
        lambda: F.scaled_dot_product_attention(q, torch.cat([k, k_new], 2), torch.cat([v, v_new], 2), enable_gqa=True)
    )
    return {
        "kind": case.name,
        "batch": batch,
        "length": length,
        **agreement,
        "ms": ms,
        "sdpa_ms": sdpa,
        "cat_sdpa_ms": eager,
        "bound_ms": bytes_read / bench.copy_bandwidth * 1e3,
        "bandwidth_fraction": bytes_read / bench.copy_bandwidth * 1e3 / ms,
        "launch_us": bench.launch_us(ours),
    }


def prefill(bench: Bench, name: str, length: int, window: int | None, sinks: int) -> dict[str, Any]:
    """Check one prefill case on 1024 tokens with a narrower window, then time it on ``length`` tokens."""
    dense = KVFormat("dense", "bfloat16", HEAD_DIM)
    spec = AttentionSpec(
        phase="prefill",
        head_dim=HEAD_DIM,
        group=HEADS // KV_HEADS,
        dtype="bfloat16",
        key_format=dense,
        value_format=dense,
        scale=HEAD_DIM**-0.5,
        window=window,
        sinks=sinks,
    )
    narrow = spec if window is None else replace(spec, window=200)
    small = random(1, HEADS, 1024), random(1, KV_HEADS, 1024), random(1, KV_HEADS, 1024)
    expected = reference.prefill_attention(narrow, *on_cpu(*small), None)
    agreement = compare(window_prefill.prefill_attention(narrow)(*small), expected)

    q, k, v = random(1, HEADS, length), random(1, KV_HEADS, length), random(1, KV_HEADS, length)
    run = window_prefill.prefill_attention(spec)
    seen = length * (length + 1) / 2
    if window is not None and length > window + sinks:
        seen -= (length - window - sinks) * (length - window - sinks + 1) / 2
    ms = bench.ms(lambda: run(q, k, v))
    return {
        "kind": name,
        "batch": 1,
        "length": length,
        **agreement,
        "ms": ms,
        "sdpa_causal_ms": bench.ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)),
        "tflops": 4 * HEADS * HEAD_DIM * seen / ms / 1e9,
    }


def random(batch: int, heads: int, tokens: int) -> Tensor:
    """Fresh normal bfloat16 numbers on the GPU."""
    return torch.randn(batch, heads, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda")


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    """Copies on the CPU, where the reference runs."""
    return [x.cpu() for x in tensors]


def compare(got: Tensor, expected: Tensor) -> dict[str, Any]:
    """Largest difference from the reference, relative to its largest value, and whether that is rounding."""
    expected = expected.float()
    error = float((got.cpu().float() - expected).abs().max() / expected.abs().max())
    return {"agrees": error <= TOLERANCE, "largest_error": error}


if __name__ == "__main__":
    sys.exit(main())
