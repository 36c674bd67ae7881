"""The launches of a fused program in Triton, and what each of their programs does.

A GPU has no barrier at which all programs of a launch meet, so a linear layer that reads another's result begins a new
launch, and so does what follows a norm of parts of a row. All else is computed where it is read, from what lies in
memory: a value is a function of row and column, so that slices, concatenations and rotations only change the column.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..fused_spec import FusedSpec, Linear, Norm, reads
from ..spec import DTYPES
from .fused_values import At, Body
from .source import TYPES

# Rows of a tile of the tensor cores: programs with linear layers have no more.
MAX_ROWS = 16
# Shared memory for what is loaded ahead: two programs per multiprocessor of an A100.
PIPELINE_BYTES = 72 * 1024


@dataclass(frozen=True)
class FusedConfig:
    """Launch choices: results of a linear layer per program, what it sums in one step, columns of all else."""

    block_n: int = 16
    block_k: int = 128
    columns: int = 1024
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Job:
    """What some programs of a launch do: the statements of a function of that name, and how many programs there are."""

    name: str
    programs: int
    lines: list[str]


class Program:
    """The launches of ``spec``: ``phases`` holds the jobs of each.

    work: floats that stand between the launches. stages: of the pipeline that loads ahead, as many as fit.
    """

    def __init__(self, spec: FusedSpec, config: FusedConfig):
        self.spec = spec
        self.config = config
        self.first = len(spec.inputs)
        self.widths = spec.widths()
        self.phases: list[list[Job]] = []
        self.work = 0
        self.stages = config.stages
        self._stored: dict[int, int] = {}
        self._made = {value for value in range(self.first, len(self.widths)) if self._makes(value)}
        self._returned: dict[int, list[int]] = {}
        for place, out in enumerate(spec.outputs):
            self._returned.setdefault(out.value, []).append(place)
        self._plan()

    def _makes(self, value: int) -> bool:
        """Whether a value is computed by programs of its own, and read from memory by others."""
        step = self.spec.steps[value - self.first]
        return isinstance(step, Linear) or (isinstance(step, Norm) and step.group != self.widths[value])

    def _plan(self) -> None:
        spec = self.spec
        read = {value for step in spec.steps for value in reads(step)}
        levels = [0] * self.first
        for value, step in enumerate(spec.steps, self.first):
            levels.append(max(levels[source] for source in reads(step)) + (value in self._made))
            if value in self._made & read:
                self._stored[value] = self.work
                self.work += spec.rows * self.widths[value]
        for phase in range(max(levels) + 1):
            self._jobs: list[Job] = []
            together: dict[Any, list[int]] = {}
            for value in sorted(v for v in self._made if levels[v] == phase + 1):
                step = spec.steps[value - self.first]
                if isinstance(step, Linear):
                    # By columns, rows of the weights lie as far apart as the layer is wide.
                    apart = value if step.by_columns else None
                    together.setdefault((step.x, step.threshold, apart), []).append(value)
                elif isinstance(step, Norm):
                    self._norm(value, step)
            for values in together.values():
                self._linears(values)
            ready = [value for value in self._returned if levels[value] == phase and value not in self._made]
            for width in dict.fromkeys(self.widths[value] for value in ready):
                self._return([value for value in ready if self.widths[value] == width], width)
            if self._jobs:
                self.phases.append(self._jobs)

    def _job(self, name: str, programs: int) -> Body:
        """Begin what ``programs`` programs of the launch do: ``part`` is the number of each among them."""
        body = Body(self.spec, self._stored, self._made, self.config.columns)
        self._jobs.append(Job(name, programs, body.lines))
        return body

    def _linears(self, values: list[int]) -> None:
        """Linear layers of one input in one order of the weights: a program computes some columns of one of them."""
        rows, config, dtype = self.spec.rows, self.config, TYPES[self.spec.dtype]
        steps = [self._linear(value) for value in values]
        k, (first, *_) = self.widths[steps[0].x], steps
        ends = list(accumulate(-(-self.widths[value] // config.block_n) for value in values))
        body = self._job("_".join(("linear", *map(str, values))), ends[-1])
        body.say(f"m = tl.arange(0, {MAX_ROWS}).to(tl.int64)[:, None]")
        for place, (value, step) in enumerate(zip(values, steps, strict=True)):
            _branch(body, place, ends)
            part = f"(part - {ends[place - 1]})" if place else "part"
            body.say(
                f"weight = in{step.weight}",
                f"n = {part} * {config.block_n} + tl.arange(0, {config.block_n})",
                f"n_ok = n < {self.widths[value]}",
            )
            body.indent = 1
        body.prepare([first.x])
        body.say(f"acc = tl.zeros(({MAX_ROWS}, {config.block_n}), tl.float32)")
        at = body.loop(k, config.block_k)
        before = len(body.lines)
        body.say(f"x = tl.where({at.ok}, {body.value(first.x, at)}, 0.0).to({dtype})")
        loads = sum(line.count("tl.load(") for line in body.lines[before:])
        step_bytes = config.block_k * (4 * MAX_ROWS * loads + DTYPES[self.spec.dtype].itemsize * config.block_n)
        self.stages = min(self.stages, 1 + PIPELINE_BYTES // step_bytes)
        inside = at.inside
        if first.threshold is not None:
            body.say(f"x = tl.where(tl.abs(x.to(tl.float32)) <= {first.threshold!r}, 0.0, x)")
        if first.by_columns:
            if first.threshold is not None:
                body.say("active = tl.max((x != 0).to(tl.int32), 0)[None, :] > 0  # rows of W that any row of x needs")
                inside = f"{inside} & active"
            body.say(
                f"w = tl.load(weight + tl.trans({at.column}).to(tl.int64) * {self.widths[values[0]]} + n[None, :], "
                f"mask=tl.trans({inside}) & n_ok[None, :], other=0)",
                "acc = tl.dot(x, w, acc, input_precision=PRECISION)",
            )
        else:
            body.say(
                f"w = tl.load(weight + n.to(tl.int64)[:, None] * {k} + {at.column}, "
                f"mask=n_ok[:, None] & {inside}, other=0)",
                "acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)",
            )
        body.indent = 1
        for place, (value, step) in enumerate(zip(values, steps, strict=True)):
            _branch(body, place, ends)
            y = "acc"
            if step.bias is not None:
                y = f"y_{value}"
                body.say(f"{y} = acc + tl.load(in{step.bias} + n, mask=n_ok, other=0).to(tl.float32)[None, :]")
            self._store(body, value, y, f"m * {self.widths[value]} + n[None, :]", f"(m < {rows}) & n_ok[None, :]")
            body.indent = 1

    def _linear(self, value: int) -> Linear:
        step = self.spec.steps[value - self.first]
        assert isinstance(step, Linear)
        return step

    def _norm(self, value: int, step: Norm) -> None:
        """A norm of parts of a row: a program takes as many parts as it has columns for."""
        width, size = self.widths[value], 1 << (step.group - 1).bit_length()
        groups = width // step.group
        each = max(1, min(self.config.columns // size, 1 << (groups - 1).bit_length()))
        parts = -(-groups // each)
        body = self._job(f"norm_{value}", self.spec.rows * parts)
        _row(body, parts)
        body.prepare([step.x])
        groups_of = f"tl.arange(0, {each})"
        if parts > 1:
            groups_of = f"(part % {parts} * {each} + {groups_of})"
        body.say(
            f"g = {groups_of}[:, None]",
            f"i = tl.arange(0, {size})[None, :]",
            f"c = g * {step.group} + i",
            f"ok = (g < {groups}) & (i < {step.group})",
        )
        at = At("c", "ok", "ok")
        body.reduce(value, step, [at])
        y = body.derived(body.normalised(value, step, at, "i"))
        self._store(body, value, y, f"m * {width} + c", "ok")

    def _return(self, values: list[int], width: int) -> None:
        """Outputs of one width that are no results of programs of their own."""
        size = min(1 << (width - 1).bit_length(), self.config.columns)
        parts = -(-width // size)
        body = self._job("_".join(("return", *map(str, values))), self.spec.rows * parts)
        _row(body, parts)
        if parts > 1:
            body.prepare(values)
        columns = f"tl.arange(0, {size})"
        if parts > 1:
            columns = f"(part % {parts} * {size} + {columns})"
        body.say(f"c = {columns}[None, :]", f"ok = c < {width}")
        at = At("c", "ok", "ok")
        if parts == 1:
            body.prepare(values, at, width)
        for value in values:
            self._store(body, value, body.value(value, at), f"m * {width} + c", "ok")

    def _store(self, body: Body, value: int, name: str, offset: str, mask: str) -> None:
        if value in self._stored:
            body.say(f"tl.store({body.place(value)} + {offset}, {name}, mask={mask})")
        for place in self._returned.get(value, []):
            body.say(f"tl.store(out{place} + {offset}, {name}.to({TYPES[self.spec.dtype]}), mask={mask})")


def _branch(body: Body, place: int, ends: list[int]) -> None:
    """Begin what is done for one of several layers, by the number of the program."""
    if len(ends) > 1:
        body.say("else:" if place == len(ends) - 1 else f"{'el' if place else ''}if part < {ends[place]}:")
        body.indent = 2


def _row(body: Body, parts: int) -> None:
    """The one row of a program, each of which has so many ``parts``."""
    number = f"part // {parts}" if parts > 1 else "part"
    body.say(f"m = ({number} + tl.zeros((1, 1), tl.int32)).to(tl.int64)")
