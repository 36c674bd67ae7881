"""How good the cost model is: predicted against measured times on a grid of attention and linear layers.

    python benchmarks/regret.py [--device cpu|cuda] [--json FILE] [--calibration FILE] [--rounds 7]

Every candidate of every point is timed, interleaved, medians of all rounds; one that does not run is named and left
out. Half of the points (drawn with a fixed seed) calibrate the model, the scores are those of the other half:
Spearman's rank correlation of predicted and measured times, and regret, the time of what the model picks over that of
the best. "kernel" regret is among the candidates of one spec; "site" regret among all formats of the KV cache at one
shape, the choice that decides whether quantising pays. ``--calibration`` writes coefficients fitted to all points.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchaccel.kernels import problem
from torchaccel.kernels.candidates import Candidate, Spec, build, candidates
from torchaccel.kernels.spec import AttentionSpec, LinearSpec

from torchaccel.cost.calibrate import calibrate
from torchaccel.cost.calibration import Calibration, shipped
from torchaccel.cost.facts import DeviceFacts
from torchaccel.cost.measure import measure
from torchaccel.cost.probe import ReadProbe, timed
from torchaccel.cost.roofline import predict_ms
from torchaccel.cost.shape import AttentionShape, LinearShape, Shape
from torchaccel.cost.traffic import Traffic

FORMATS = ("dense", "int8", "int4")
# (head dim, query heads per KV head), (batch, KV heads), stored tokens.
HEADS = ((64, 1), (64, 3), (64, 8), (128, 4))
BATCHES = ((1, 1), (1, 4), (2, 2), (8, 1), (4, 8))
LENGTHS = (64, 300, 1024, 5000, 32768)
PROMPTS = (64, 200, 1024, 2048)
# (width of x, widths of the results) of linear layers that share x.
LAYERS = (
    (256, (256,)),
    (768, (768, 256, 256)),
    (768, (4096,)),
    (2048, (768,)),
    (768, (32000,)),
    (4096, (4096,)),
    (4096, (3072, 1536, 1536)),
)
# Points beyond these would take most of the time and decide nothing.
MAX_KV_BYTES = 72e6
MAX_PROMPT_FLOPS = 6e9
# Stock operators and the reference are left out where one call takes longer.
PATIENCE_MS = 50.0
PROBE_MEGABYTES = 256
# Shorter calls are repeated within a sample.
SAMPLE_MS = 0.5


@dataclass
class Point:
    """One spec at one shape; ``site`` is shared by the formats that could stand in for each other; ms by candidate."""

    site: str
    spec: Spec
    shape: Shape
    ms: dict[Candidate, float] = field(default_factory=dict)

    def predicted(self, facts: DeviceFacts, calibration: Calibration) -> dict[Candidate, float]:
        """Predicted milliseconds of every timed candidate."""
        return {c: predict_ms(self.spec, c, self.shape, facts, calibration) for c in self.ms}

    def to_dict(self, facts: DeviceFacts, calibration: Calibration) -> dict[str, Any]:
        """The point with measured and predicted times."""
        predicted = self.predicted(facts, calibration)
        times = {c.key(): {"ms": self.ms[c], "predicted_ms": predicted[c]} for c in self.ms}
        return {"site": self.site, "spec": asdict(self.spec), "shape": self.shape.to_dict(), "candidates": times}


def main() -> int:
    """Time the grid, print the scores, write the documents that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write points and scores to this file")
    parser.add_argument("--calibration", type=Path, help="write coefficients fitted to all points to this file")
    parser.add_argument("--rounds", type=int, default=7, help="samples of every candidate")
    parser.add_argument("--every", type=int, default=1, help="take every n-th point of the grid only")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda was asked for, and torch sees no GPU on this machine; use --device cpu", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    facts = measure(device)
    points = list(grid())[:: options.every]
    random.Random(0).shuffle(points)
    began = time.perf_counter()
    # A virtual machine drifts with its neighbours. What counts is the bandwidth of the whole run; a rate of products
    # that was measured too low would be made up for by coefficients.
    probe, bandwidths = ReadProbe(device, PROBE_MEGABYTES), []
    for number, point in enumerate(points):
        time_point(point, device, options.rounds)
        if number % 10 == 0:
            bandwidths.append(probe.gbs())
        if number % 50 == 49:
            print(f"{number + 1} of {len(points)} points, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    later = measure(device)
    rates = tuple((name, max(rate, later.rate(name))) for name, rate in facts.gflops)
    facts = replace(facts, dram_gbs=statistics.median(bandwidths), gflops=rates)
    points = [point for point in points if point.ms]
    half = len(points) // 2
    fitted = calibrate(samples(points[:half]), facts)
    models = {"uncalibrated": Calibration({}), "shipped": shipped(), "calibrated": fitted}
    scores = {name: score(points[half:], facts, model) for name, model in models.items()}
    print_scores(scores, len(points), len(points) - half)
    if options.json:
        document = {
            "command": ["python", "benchmarks/regret.py", *sys.argv[1:]],
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "device": facts.to_dict(),
            "scores": scores,
            "calibrated_on": half,
            "points": [point.to_dict(facts, fitted) for point in points],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.calibration:
        source = f"{facts.name}, {facts.processors} processors, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        whole = calibrate(samples(points), facts, source)
        options.calibration.write_text(json.dumps(whole.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0


def grid() -> Iterator[Point]:
    """Decode in every format, decode of several tokens and with a window, prompts, linear layers."""
    for dim, group in HEADS:
        for batch, heads in BATCHES:
            for tokens in LENGTHS:
                if 4 * batch * heads * tokens * dim > MAX_KV_BYTES:
                    continue
                for name in FORMATS:
                    methods = {} if name == "dense" else {"kv_compression": {"method": name}}
                    spec = Traffic(methods).spec("decode", "bfloat16", dim, group)
                    site = f"decode D{dim} G{group} B{batch} H{heads} S{tokens}"
                    # One more than whole blocks: their completion is not part of most steps.
                    yield Point(site, spec, AttentionShape(batch, heads, 1, tokens + 1))
    windowed = Traffic({"sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 256}})
    for traffic in (Traffic({}), windowed):
        name = "dense" if traffic.window[0] is None else "window"
        for dtype in ("float32", "bfloat16"):
            spec = traffic.spec("decode", dtype, 64, 4)
            for tokens in (200, 2000, 20000):
                yield Point(f"{name} {dtype} S{tokens}", spec, AttentionShape(1, 4, 1, tokens))
                yield Point(f"{name} {dtype} S{tokens} Q4", spec, AttentionShape(1, 4, 4, tokens))
            for dim, group, heads in ((64, 3, 1), (64, 3, 4), (128, 4, 2)):
                for tokens in PROMPTS:
                    if 4 * heads * group * tokens**2 * dim < MAX_PROMPT_FLOPS:
                        spec = traffic.spec("prefill", dtype, dim, group)
                        shape = AttentionShape(1, heads, tokens, tokens)
                        yield Point(f"prompt {name} {dtype} D{dim} H{heads} S{tokens}", spec, shape)
    for dtype in ("float32", "bfloat16"):
        for rows in (1, 2, 8):
            for inputs, outputs in LAYERS:
                shape = LinearShape(rows, inputs, outputs)
                yield Point(f"linear {dtype} {rows} {inputs} {outputs}", LinearSpec(dtype, rows, False), shape)


def time_point(point: Point, device: torch.device, rounds: int) -> None:
    """Median milliseconds of every candidate that is quick enough."""
    args = problem.make(point.spec, sizes(point), device, 0)
    calls: dict[Candidate, Callable[[], Any]] = {}
    repeats: dict[Candidate, int] = {}
    for candidate in candidates(point.spec, device.type):
        try:
            call = partial(build(point.spec, candidate), *args)
            call()  # compiles
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"left out: {point.site}, {candidate.key()}: {type(error).__name__}: {reason}", file=sys.stderr)
            continue
        once = timed(call, device)
        if once > PATIENCE_MS and candidate.implementation in ("composed", "reference"):
            continue
        calls[candidate] = call
        repeats[candidate] = 1 if device.type == "cuda" else max(1, int(SAMPLE_MS / once))
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in calls}
    order = list(calls)
    for turn in range(rounds if order else 0):
        for candidate in order[turn % len(order) :] + order[: turn % len(order)]:
            calls[candidate]()  # the candidate before has left its own tensors in the caches
            many = partial(again, calls[candidate], repeats[candidate])
            times[candidate].append(timed(many, device) / repeats[candidate])
    point.ms = {candidate: statistics.median(values) for candidate, values in times.items()}


def again(call: Callable[[], Any], times: int) -> None:
    """Call ``call`` so often."""
    for _ in range(times):
        call()


def sizes(point: Point) -> dict[str, int]:
    """The symbols by which inputs are made."""
    shape = point.shape
    if isinstance(shape, LinearShape):
        return {"M": shape.rows, "K": shape.inputs, "N": sum(shape.outputs)}
    found = {"B": shape.batch, "H_kv": shape.kv_heads, "S": shape.tokens}
    return found | {"Q": shape.queries} if is_decode(point.spec) else found


def is_decode(spec: Spec) -> bool:
    """Whether ``spec`` appends to a cache."""
    return isinstance(spec, AttentionSpec) and spec.phase == "decode"


def samples(points: Sequence[Point]) -> Iterator[tuple[Spec, Shape, Candidate, float]]:
    """What calibration takes."""
    return ((p.spec, p.shape, candidate, ms) for p in points for candidate, ms in p.ms.items())


def score(points: Sequence[Point], facts: DeviceFacts, calibration: Calibration) -> dict[str, Any]:
    """Rank correlation, error and both kinds of regret of a calibration on ``points``."""
    measured, predicted, kernel = [], [], []
    sites: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        guess = point.predicted(facts, calibration)
        pick = min(guess, key=lambda candidate: guess[candidate])
        kernel.append(point.ms[pick] / min(point.ms.values()))
        sites[point.site].append((guess[pick], point.ms[pick]))
        measured += [point.ms[candidate] for candidate in guess]
        predicted += guess.values()
    several = [group for group in sites.values() if len(group) > 1]
    site = [min(group)[1] / min(ms for _, ms in group) for group in several]
    errors = [abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True)]
    return {
        "times": len(measured),
        "rank_correlation": spearman(predicted, measured),
        "median_error": math.exp(statistics.median(errors)) - 1,
        "kernel_regret": spread(kernel),
        "site_regret": spread(site),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks of two equally long sequences."""

    def ranks(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def spread(regrets: Sequence[float]) -> dict[str, float | int]:
    """Number, median, 95th percentile and largest of some regrets."""
    if not regrets:
        return {"n": 0, "median": 1.0, "p95": 1.0, "max": 1.0}
    ordered = sorted(regrets)
    p95 = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    return {"n": len(ordered), "median": statistics.median(ordered), "p95": p95, "max": ordered[-1]}


def print_scores(scores: dict[str, dict[str, Any]], points: int, scored: int) -> None:
    """One line for each state of the model."""
    print(f"{points} points, scored on {scored} that calibration did not see")
    print(f"{'':14}{'rank corr.':>11}{'error':>8}   kernel regret: median, p95, max   site regret: median, p95, max")
    for name, found in scores.items():
        line = f"{name:14}{found['rank_correlation']:11.3f}{found['median_error']:8.0%}"
        for regret in (found["kernel_regret"], found["site_regret"]):
            line += f"{regret['median']:17.3f}{regret['p95']:8.3f}{regret['max']:8.3f}"
        print(line)


if __name__ == "__main__":
    raise SystemExit(main())
