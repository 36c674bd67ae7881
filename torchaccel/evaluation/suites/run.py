"""``torchaccel bench attention --suite``: every scenario in one process and one document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...cost.probe import ReadProbe, timed
from ..machine import Machine, measure_machine, versions
from ..results import Fidelity, Result, document
from ..session import Progress, Silent
from ..timing import LoadWatch, Spread, interleave, require_quiet, speedups
from . import decode, mlp, prefill, prefix, ragged
from .contender import Contender, Scenario
from .geometry import DTYPE, Geometry

WARMUP = 2


@dataclass(frozen=True)
class Suite:
    """The lengths of a suite's scenarios, and the width of its MLP."""

    device: str
    decode: int
    prefill: int
    prefix: int
    mlp: int = 2048


SUITES = {
    "cpu": Suite("cpu", 32768, 8192, 16384),
    "gpu": Suite("cuda", 131072, 32768, 16384),
}


def run_suite(
    name: str,
    command: Sequence[str],
    progress: Progress | None = None,
    *,
    baselines: Sequence[str] = ("sdpa", "flex"),
    quiet: bool = False,
    suite: Suite | None = None,
) -> dict[str, Any]:
    """Run the suite ``name`` ("cpu" or "gpu") and return its results document.

    A record's variant is "<who>@<scenario>"; its ``details`` hold the scenario's goal, if the record has one, and what
    was reached. ``suite`` replaces the lengths. Raises ``ValueError`` for an unknown suite or one whose device is not
    there, ``RuntimeError`` when ``quiet`` is asked for and others use the machine.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; the suites are {', '.join(SUITES)}")
    sizes = suite or SUITES[name]
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"the suite {name!r} needs a CUDA device, and torch sees none here; run --suite cpu")
    if quiet:
        require_quiet()
    torch.manual_seed(0)
    device, progress = torch.device(sizes.device), progress or Silent()
    geometry = Geometry(device, sizes.decode, sizes.prefill, sizes.prefix)
    makers = list(_scenarios(geometry, sizes.mlp, "flex" in baselines))
    progress.begin(1 + 2 * len(makers))
    progress.advance("measuring the machine")
    machine, watch = measure_machine(device), LoadWatch()
    results: list[Result] = []
    for title, make in makers:
        progress.advance(f"{title}: compiling and warming up")
        scenario = make()
        scenario = Scenario(
            scenario.name,
            [c for c in scenario.contenders if _asked(c, baselines)],
            scenario.goals,
            scenario.rounds,
            scenario.burst,
        )
        progress.advance(f"{title}: timing, interleaved")
        results += _race(scenario, machine, watch, device)
    case = {"kind": "attention", "suite": name, "batch": 1, "context": sizes.decode, "new_tokens": None}
    return document(
        command=list(command),
        versions=versions(),
        machine=machine.to_dict() | watch.result(),
        model={
            "name": f"suite {name}", "params": 0, "weight_bytes": 0, "dtype": DTYPE, "layers": 1,
            "heads": geometry.heads, "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim,
        },
        case=case,
        results=results,
    )  # fmt: skip


def _scenarios(g: Geometry, width: int, flex: bool) -> Iterator[tuple[str, Callable[[], Scenario]]]:
    yield "decode", partial(decode.scenario, g, flex=flex)
    yield "prefill", partial(prefill.scenario, g, flex=flex)
    yield "ragged", partial(ragged.scenario, g)
    for group in (1, g.group):
        yield f"shared prefix, group {group}", partial(prefix.scenario, g, group)
    yield "mlp", partial(mlp.scenario, g, width)


def _asked(contender: Contender, baselines: Sequence[str]) -> bool:
    return contender.label.startswith("torchaccel:") or contender.label in baselines


def _race(scenario: Scenario, machine: Machine, watch: LoadWatch, device: torch.device) -> list[Result]:
    """Records of one scenario; goals are judged by medians, bandwidth by that of the same rounds."""
    contenders = {c.label: c for c in scenario.contenders}
    for contender in scenario.contenders:
        for _ in range(WARMUP):
            contender()
    probe = ReadProbe(device, 512)
    bandwidths: list[float] = []
    calls = {label: partial(_sample, contender, scenario.burst, device) for label, contender in contenders.items()}
    with watch.watching():
        samples, failures = interleave(calls, scenario.rounds, lambda: bandwidths.append(probe.gbs()))
    read_gbs = statistics.median(bandwidths)
    medians = {label: statistics.median(values) for label, values in samples.items()}
    results = []
    for label, contender in contenders.items():
        result = Result(f"{label}@{scenario.name}", {}, fidelity=Fidelity(max_abs_err_vs_fp32=contender.error))
        result.density, result.kv_bytes = contender.density, int(contender.read_bytes)
        if label in failures:
            result.fail(failures[label])
        else:
            result.ms = Spread.of(samples[label])
            result.speedup = {f"{other}@{scenario.name}": x for other, x in speedups(samples, label).items()}
            rate = machine.gemm_gflops.get(contender.dtype) or max(machine.gemm_gflops.values())
            result.bound_ms = max(contender.read_bytes / read_gbs, contender.flops / rate) / 1e6
            result.details = {"read_gbs": round(read_gbs, 2), "goals": _judged(scenario, label, medians, read_gbs)}
        results.append(result)
    return results


def _sample(contender: Contender, burst: int, device: torch.device) -> float:
    """Milliseconds of a call, of ``burst`` in a row."""

    def calls() -> None:
        for _ in range(burst):
            contender()

    return timed(calls, device) / burst


def _judged(
    scenario: Scenario, label: str, medians: Mapping[str, float], read_gbs: float
) -> list[dict[str, str | float | bool]]:
    judged: list[dict[str, str | float | bool]] = []
    for goal in scenario.goals(read_gbs):
        if goal.label == label:
            try:
                reached = goal.reached(medians)
            except KeyError:  # what it is compared with was not asked for, or failed
                continue
            judged.append(
                {
                    "text": goal.text,
                    "asked": round(goal.asked, 4),
                    "reached": round(reached, 4),
                    "ok": round(reached, 4) >= round(goal.asked, 4),
                }
            )
    return judged
