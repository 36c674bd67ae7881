"""What the cases of a benchmark share: model, machine, settings, and the way to time all variants together."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from .arms import Arm
from .machine import Machine, ReadProbe
from .models import LoadedModel, ModelFacts, model_facts
from .results import Result
from .roofline import Work
from .timing import LoadWatch, Spread, interleave, speedups
from .variants import Variant

RECOMPILE_LIMIT = 128


class Progress(Protocol):
    """Where a run says what it is doing."""

    def begin(self, steps: int) -> None:
        """The run has ``steps`` steps."""

    def advance(self, doing: str) -> None:
        """One step is done; ``doing`` names the next."""


class Silent:
    """Progress nobody looks at."""

    def begin(self, steps: int) -> None:
        """Ignored."""

    def advance(self, doing: str) -> None:
        """Ignored."""


@dataclass(frozen=True)
class Case:
    """One benchmark: ``context`` tokens of prompt or cache, ``batch`` rows, ``rounds`` timed samples per variant."""

    kind: str
    context: int
    batch: int = 1
    new_tokens: int | None = None
    rounds: int = 20
    warmup: int = 3
    fidelity: bool = True
    recall_questions: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The case as the results document names it."""
        return {
            "kind": self.kind,
            "batch": self.batch,
            "context": self.context,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "warmup": self.warmup,
        }


@dataclass
class Session:
    """A model on a machine, ready to run a case."""

    loaded: LoadedModel
    machine: Machine
    case: Case
    device: torch.device
    caches: str = "cold"
    probe_megabytes: int = 512
    progress: Progress = field(default_factory=Silent)
    watch: LoadWatch = field(default_factory=LoadWatch)

    def __post_init__(self) -> None:
        self.facts: ModelFacts = model_facts(self.loaded)
        self.work = Work.of(self.loaded.model, self.facts)
        self.new_tokens: int = self.case.new_tokens or 1

    def prepare(self, variants: Sequence[Variant], start: Callable[[Arm], None]) -> tuple[list[Result], dict[str, Arm]]:
        """Build every variant and let ``start`` run it until it is warm; those that fail leave the race here.

        Returns the records of all variants in order, and the arms that are ready by label.
        """
        results: list[Result] = []
        arms: dict[str, Arm] = {}
        for variant in variants:
            self.progress.advance(f"{variant.label}: compiling and warming up")
            result = Result(variant.label, dict(variant.options))
            try:
                arm = Arm(variant, self.loaded.model, self.device, self.caches)
                result = arm.result
                start(arm)
                arm.warm = True
                arms[variant.label] = arm
            except Exception as error:  # recorded: the document names the variant and the reason
                result.fail(error)
            results.append(result)
        return results, arms

    def finish(self, arms: Mapping[str, Arm], measured: Mapping[str, object], describe: Callable[[Arm], None]) -> None:
        """Let ``describe`` complete the records of the measured variants; what it raises fails the variant."""
        for label in measured:
            try:
                describe(arms[label])
            except Exception as error:  # recorded, as above
                arms[label].result.fail(error)

    def race(self, arms: Mapping[str, Arm], calls: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Time ``calls`` interleaved for ``case.rounds`` rounds and note median and ratios in the arms' results.

        The machine's read bandwidth becomes the median over the same rounds: floors are held against medians.
        """
        probe = ReadProbe(self.device, self.probe_megabytes)
        bandwidths: list[float] = []

        def on_round() -> None:
            bandwidths.append(probe.gbs())
            self.progress.advance("timing all variants, interleaved")

        with self.watch.watching():
            samples, failures = interleave(calls, self.case.rounds, on_round)
        self.machine = replace(self.machine, read_gbs=statistics.median(bandwidths))
        for label, error in failures.items():
            arms[label].result.fail(error)
        for label, values in samples.items():
            arms[label].result.ms = Spread.of(values)
            arms[label].result.speedup = speedups(samples, label)
        return samples


@contextlib.contextmanager
def fresh_compilers(*, cold: bool) -> Iterator[None]:
    """Forget compiled graphs, and with ``cold`` compile into an empty cache folder, so that compile times mean cold.

    All variants share the code objects of one model class, so Dynamo's recompile limit, which guards against endless
    recompilation of one function, is raised for the time of the run.
    """
    from torch._inductor.utils import fresh_cache

    with contextlib.ExitStack() as stack:
        if cold:
            # The folder is ours to remove: a process that still writes to it must not end the run.
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            stack.enter_context(fresh_cache(dir=folder, delete=False))
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT))
        torch._dynamo.reset()
        try:
            yield
        finally:
            torch._dynamo.reset()
