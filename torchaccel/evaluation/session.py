"""What the cases of a benchmark share: model, machine, settings, and the way to time all variants together."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from ..cost.facts import DeviceFacts
from ..cost.measure import measure
from ..cost.predict import Cost, predict_model
from ..cost.probe import ReadProbe
from .arms import Arm
from .case import Case
from .machine import Machine
from .models import LoadedModel, ModelFacts, model_facts
from .results import Result
from .roofline import Work
from .runners import runner_of
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


@dataclass
class Session:
    """A model on a machine, ready to run a case.

    ``caches`` says how compilation finds its caches on disk, "cold" or "warm". ``on_result`` is called with the records
    that are final, in the order of the variants, whenever one more is.
    """

    loaded: LoadedModel
    machine: Machine
    case: Case
    device: torch.device
    caches: str = "cold"
    probe_megabytes: int = 512
    progress: Progress = field(default_factory=Silent)
    watch: LoadWatch = field(default_factory=LoadWatch)
    on_result: Callable[[Sequence[Result]], None] | None = None

    def __post_init__(self) -> None:
        self._results: dict[str, Result] = {}
        self._final: set[str] = set()
        self.facts: ModelFacts = model_facts(self.loaded)
        self.work = Work.of(self.loaded.model, self.facts)
        self.new_tokens: int = self.case.new_tokens or 1

    def prepare(
        self, variants: Sequence[Variant], start: Callable[[Arm], None], subject: Any = None
    ) -> tuple[list[Result], dict[str, Arm]]:
        """Build every variant and let ``start`` run it until it is warm; those that fail leave the race here.

        ``subject`` is what is built, the session's model where nothing is given. Returns the records of all variants in
        order, and the arms that are ready by label.
        """
        arms: dict[str, Arm] = {}
        self._results = {variant.label: Result(variant.label, dict(variant.options)) for variant in variants}
        # Those whose settings follow from what others measured come last.
        for variant in sorted(variants, key=lambda v: runner_of(v, self.case.kind).follows):
            self.progress.advance(f"{variant.label}: compiling and warming up")
            runner = runner_of(variant, self.case.kind)
            reason = self._inapplicable(variant, runner.cases) or runner.absent()
            if reason is not None:
                self._results[variant.label].status, self._results[variant.label].reason = "absent", reason
                self._finished(variant.label)
                continue
            try:
                runner.settle(list(self._results.values()), self.facts, self.case)
                settled = replace(variant, options=runner.options)
                built = self.loaded.model if subject is None else subject
                arm = Arm(settled, built, self.device, self.caches, self.case.kind)
                self._results[variant.label] = arm.result
                start(arm)
                arm.warm = True
                arms[variant.label] = arm
            except Exception as error:  # recorded: the document names the variant and the reason
                self._results[variant.label].fail(error)
                self._finished(variant.label)
        return list(self._results.values()), {label: arms[label] for label in self._results if label in arms}

    def finish(self, arms: Mapping[str, Arm], measured: Mapping[str, object], describe: Callable[[Arm], None]) -> None:
        """Let ``describe`` complete the records of the measured variants; what it raises fails the variant."""
        for label, arm in arms.items():
            if label in measured:
                try:
                    describe(arm)
                except Exception as error:  # recorded, as above
                    arm.result.fail(error)
            self._finished(label)

    def compile_again(
        self, arms: Mapping[str, Arm], measured: Mapping[str, object], call: Callable[[Arm], object]
    ) -> None:
        """Compile the measured variants once more, from the caches the first time filled: the warm compile time.

        ``call`` runs an arm as often as it takes until everything is compiled. Does nothing in a session whose first
        compilation was the warm one. Libraries of generated kernels stay loaded; a new process opens them in no time.
        """
        if self.caches != "cold":
            return
        forget_compiled()
        for label, arm in arms.items():
            if label in measured and arm.compiles and arm.result.status != "failed":
                self.progress.advance(f"{label}: compiling again")
                try:
                    arm.compile_again(partial(call, arm))
                except Exception as error:  # recorded, as above
                    arm.result.fail(error)

    def _inapplicable(self, variant: Variant, cases: Sequence[str]) -> str | None:
        if self.case.kind in cases:
            return None
        return f"{variant.label} does not apply to {self.case.kind}; it takes part in {', '.join(cases)}"

    def _finished(self, label: str) -> None:
        self._final.add(label)
        if self.on_result is not None:
            self.on_result([result for name, result in self._results.items() if name in self._final])

    def predicted(self, arm: Arm) -> Cost | None:
        """What the cost model says of a torchaccel variant; None for others and for methods it does not know."""
        if arm.applied is None or not arm.variant.label.startswith("torchaccel:"):
            return None
        # The bandwidth of the moments in which the samples were taken, as for the floors.
        facts = replace(self._device_facts, dram_gbs=self.machine.read_gbs)
        sizes = {"batch": self.case.batch, "context": self.case.context}
        try:
            return predict_model(self.loaded.model, sizes, arm.applied, facts).asked
        except ValueError:
            return None

    @cached_property
    def _device_facts(self) -> DeviceFacts:
        return measure(self.device)

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


def forget_compiled() -> None:
    """Forget compiled graphs and what was read from the cache folder; the folder itself stays."""
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()


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
