"""What the GPU benchmarks share: a clock on a cold L2 cache, random inputs, and the comparison with the reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Rounding of the probabilities and of the result to bfloat16, per unit of the largest expected value.
TOLERANCE = 1.6e-2


class Bench:
    """A clock for GPU work on a cold L2 cache."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        properties = torch.cuda.get_device_properties(0)
        self.flush = torch.empty(max(256 << 20, 4 * properties.L2_cache_size), dtype=torch.uint8, device="cuda")
        self.copy_bandwidth = self._measure_copy()
        self.gemm_rate = self._measure_gemm()

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
            "gemm_tflops": round(self.gemm_rate / 1e12, 1),
        }

    def _measure_copy(self) -> float:
        """Bytes read and written per second by a large copy."""
        size = 1 << 30
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2 * size / (self.ms(lambda: target.copy_(source)) / 1e3)

    def _measure_gemm(self, size: int = 8192) -> float:
        """Floating-point operations per second of a large bfloat16 product."""
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        return 2 * size**3 / (self.ms(lambda: a @ b) / 1e3)

    def roofline(self, ms: float, read: float = 0, flops: float = 0) -> dict[str, float]:
        """Time that the machine needs at least, and its share of the time taken."""
        bound = max(read / self.copy_bandwidth, flops / self.gemm_rate) * 1e3
        return {"ms": ms, "roofline_ms": bound, "roofline_fraction": bound / ms}


def random(batch: int, heads: int, tokens: int, width: int = HEAD_DIM) -> Tensor:
    """Fresh normal bfloat16 numbers on the GPU."""
    return torch.randn(batch, heads, tokens, width, dtype=torch.bfloat16, device="cuda")


def on_cpu(*tensors: Tensor | None) -> list[Any]:
    """Copies on the CPU, where the reference runs."""
    return [None if x is None else x.clone().cpu() for x in tensors]


def compare(got: Any, expected: Any) -> dict[str, Any]:
    """Largest difference from the reference, relative to its largest value, and whether that is rounding."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True)
    errors = [float((x.cpu().float() - y.float()).abs().max() / y.float().abs().max()) for x, y in pairs]
    return {"agrees": all(error <= TOLERANCE for error in errors), "largest_error": max(errors)}
