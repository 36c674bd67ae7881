"""The launches of a fused program in Triton, what each of their programs does, and the statements it does it with.

A GPU has no barrier at which all programs of a launch meet, so a linear layer that reads another's result begins a new
launch, and so does what follows a norm of parts of a row. All else is computed where it is read, from what lies in
memory: a value is a function of row and column, so that slices, concatenations and rotations only change the column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..fused_spec import (
    Activation,
    Add,
    Concat,
    FusedSpec,
    Gather,
    Linear,
    Multiply,
    Norm,
    Rope,
    Scale,
    Slice,
    reads,
)
from ..spec import DTYPES
from .source import TYPES

# Rows of a tile of the tensor cores: programs with linear layers have no more.
MAX_ROWS = 16
# Shared memory for what is loaded ahead: two programs per multiprocessor of an A100.
PIPELINE_BYTES = 72 * 1024

FUNCTIONS = {
    "silu": "{x} * tl.sigmoid({x})",
    "gelu": "0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))",
    "gelu_tanh": "{x} * tl.sigmoid(1.5957691216057308 * {x} * (1.0 + 0.044715 * {x} * {x}))",
    "relu": "tl.where({x} < 0, 0.0, {x})",
    "sigmoid": "tl.sigmoid({x})",
    "tanh": "1.0 - 2.0 / (1.0 + tl.exp(2.0 * {x}))",
}


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


@dataclass(frozen=True)
class _At:
    """Where a value is wanted: names of its columns, of which columns exist, and of which elements do."""

    column: str
    inside: str
    ok: str


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
        self._returned: dict[int, list[int]] = {}
        for place, out in enumerate(spec.outputs):
            self._returned.setdefault(out.value, []).append(place)
        self._plan()

    # ---- Launches ----------------------------------------------------------------------------------------------------

    def _makes(self, value: int) -> bool:
        """Whether a value is computed by programs of its own, and read from memory by others."""
        step = self.spec.steps[value - self.first] if value >= self.first else None
        return isinstance(step, Linear) or (isinstance(step, Norm) and step.group != self.widths[value])

    def _plan(self) -> None:
        spec = self.spec
        read = {value for step in spec.steps for value in reads(step)}
        levels = [0] * self.first
        for value, step in enumerate(spec.steps, self.first):
            levels.append(max(levels[source] for source in reads(step)) + self._makes(value))
            if self._makes(value) and value in read:
                self._stored[value] = self.work
                self.work += spec.rows * self.widths[value]
        for phase in range(max(levels) + 1):
            self._jobs: list[Job] = []
            made = [v for v in range(self.first, len(levels)) if levels[v] == phase + 1 and self._makes(v)]
            together: dict[Any, list[int]] = {}
            for value in made:
                step = spec.steps[value - self.first]
                if isinstance(step, Linear):
                    # By columns, rows of the weights lie as far apart as the layer is wide.
                    apart = value if step.by_columns else None
                    together.setdefault((step.x, step.threshold, apart), []).append(value)
                elif isinstance(step, Norm):
                    self._norm(value, step)
            for values in together.values():
                self._linears(values)
            ready = [value for value in self._returned if levels[value] == phase and not self._makes(value)]
            for width in dict.fromkeys(self.widths[value] for value in ready):
                self._return([value for value in ready if self.widths[value] == width], width)
            if self._jobs:
                self.phases.append(self._jobs)

    def _job(self, name: str, programs: int) -> None:
        """Begin what ``programs`` programs of the launch do: ``part`` of them is the number of each."""
        self._jobs.append(Job(name, programs, []))
        self._indent = 1
        self._known: dict[tuple[int, _At], str] = {}
        self._statistics: dict[int, tuple[str | None, str]] = {}
        self._names = 0

    def _linears(self, values: list[int]) -> None:
        """Linear layers of one input in one order of the weights: a program computes some columns of one of them."""
        rows, config, dtype = self.spec.rows, self.config, TYPES[self.spec.dtype]
        steps = [self._linear(value) for value in values]
        k, (first, *_) = self.widths[steps[0].x], steps
        ends = list(accumulate(-(-self.widths[value] // config.block_n) for value in values))
        self._job("_".join(("linear", *map(str, values))), ends[-1])
        self._say(f"m = tl.arange(0, {MAX_ROWS}).to(tl.int64)[:, None]")
        for place, (value, step) in enumerate(zip(values, steps, strict=True)):
            self._branch(place, ends)
            part = f"(part - {ends[place - 1]})" if place else "part"
            self._say(
                f"weight = in{step.weight}",
                f"n = {part} * {config.block_n} + tl.arange(0, {config.block_n})",
                f"n_ok = n < {self.widths[value]}",
            )
            self._indent = 1
        self._prepare([first.x])
        self._say(f"acc = tl.zeros(({MAX_ROWS}, {config.block_n}), tl.float32)")
        at = self._loop(k, config.block_k)
        before = len(self._jobs[-1].lines)
        self._say(f"x = tl.where({at.ok}, {self._value(first.x, at)}, 0.0).to({dtype})")
        loads = sum(line.count("tl.load(") for line in self._jobs[-1].lines[before:])
        step_bytes = config.block_k * (4 * MAX_ROWS * loads + DTYPES[self.spec.dtype].itemsize * config.block_n)
        self.stages = min(self.stages, 1 + PIPELINE_BYTES // step_bytes)
        inside = at.inside
        if first.threshold is not None:
            self._say(f"x = tl.where(tl.abs(x.to(tl.float32)) <= {first.threshold!r}, 0.0, x)")
        if first.by_columns:
            if first.threshold is not None:
                self._say("active = tl.max((x != 0).to(tl.int32), 0)[None, :] > 0  # rows of W that any row of x needs")
                inside = f"{inside} & active"
            self._say(
                f"w = tl.load(weight + tl.trans({at.column}).to(tl.int64) * {self.widths[values[0]]} + n[None, :], "
                f"mask=tl.trans({inside}) & n_ok[None, :], other=0)",
                "acc = tl.dot(x, w, acc, input_precision=PRECISION)",
            )
        else:
            self._say(
                f"w = tl.load(weight + n.to(tl.int64)[:, None] * {k} + {at.column}, "
                f"mask=n_ok[:, None] & {inside}, other=0)",
                "acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)",
            )
        self._indent = 1
        for place, (value, step) in enumerate(zip(values, steps, strict=True)):
            self._branch(place, ends)
            y = "acc"
            if step.bias is not None:
                y = f"y_{value}"
                self._say(f"{y} = acc + tl.load(in{step.bias} + n, mask=n_ok, other=0).to(tl.float32)[None, :]")
            self._store(value, y, f"m * {self.widths[value]} + n[None, :]", f"(m < {rows}) & n_ok[None, :]")
            self._indent = 1

    def _linear(self, value: int) -> Linear:
        step = self.spec.steps[value - self.first]
        assert isinstance(step, Linear)
        return step

    def _branch(self, place: int, ends: list[int]) -> None:
        """Begin what is done for one of several layers, by the number of the program."""
        if len(ends) > 1:
            self._say("else:" if place == len(ends) - 1 else f"{'el' if place else ''}if part < {ends[place]}:")
            self._indent = 2

    def _norm(self, value: int, step: Norm) -> None:
        """A norm of parts of a row: a program takes as many parts as it has columns for."""
        width, size = self.widths[value], 1 << (step.group - 1).bit_length()
        groups = width // step.group
        each = max(1, min(self.config.columns // size, 1 << (groups - 1).bit_length()))
        parts = -(-groups // each)
        self._job(f"norm_{value}", self.spec.rows * parts)
        self._row(parts)
        self._prepare([step.x])
        groups_of = f"tl.arange(0, {each})"
        if parts > 1:
            groups_of = f"(part % {parts} * {each} + {groups_of})"
        self._say(
            f"g = {groups_of}[:, None]",
            f"i = tl.arange(0, {size})[None, :]",
            f"c = g * {step.group} + i",
            f"ok = (g < {groups}) & (i < {step.group})",
        )
        at = _At("c", "ok", "ok")
        self._reduce(value, step, [at])
        y = self._derived(self._normalised(value, step, at, "i"))
        self._store(value, y, f"m * {width} + c", "ok")

    def _return(self, values: list[int], width: int) -> None:
        """Outputs of one width that are no results of programs of their own."""
        size = min(1 << (width - 1).bit_length(), self.config.columns)
        parts = -(-width // size)
        self._job("_".join(("return", *map(str, values))), self.spec.rows * parts)
        self._row(parts)
        if parts > 1:
            self._prepare(values)
        columns = f"tl.arange(0, {size})"
        if parts > 1:
            columns = f"(part % {parts} * {size} + {columns})"
        self._say(f"c = {columns}[None, :]", f"ok = c < {width}")
        at = _At("c", "ok", "ok")
        if parts == 1:
            self._prepare(values, at, width)
        for value in values:
            self._store(value, self._value(value, at), f"m * {width} + c", "ok")

    def _row(self, parts: int) -> None:
        number = f"part // {parts}" if parts > 1 else "part"
        self._say(f"m = ({number} + tl.zeros((1, 1), tl.int32)).to(tl.int64)")

    def _store(self, value: int, name: str, offset: str, mask: str) -> None:
        if value in self._stored:
            self._say(f"tl.store({self._kept(value)} + {offset}, {name}, mask={mask})")
        for place in self._returned.get(value, []):
            self._say(f"tl.store(out{place} + {offset}, {name}.to({TYPES[self.spec.dtype]}), mask={mask})")

    # ---- Statistics of norms of whole rows ---------------------------------------------------------------------------

    def _prepare(self, values: list[int], at: _At | None = None, width: int = 0) -> None:
        """Compute the statistics that ``values`` need; of rows of ``width`` at ``at``, which holds them whole."""
        for value in self._inline_norms(values):
            step = self.spec.steps[value - self.first]
            assert isinstance(step, Norm)
            self._reduce(value, step, [at] if at is not None and self.widths[value] == width else [])

    def _inline_norms(self, values: list[int]) -> list[int]:
        found: set[int] = set()

        def visit(value: int) -> None:
            if value < self.first or value in self._stored:
                return
            step = self.spec.steps[value - self.first]
            for source in reads(step):
                visit(source)
            if isinstance(step, Norm) and not self._makes(value):
                found.add(value)

        for value in values:
            visit(value)
        return sorted(found)

    def _reduce(self, value: int, step: Norm, where: list[_At]) -> None:
        """Mean and inverse deviation: of the columns that ``where`` holds, or in a loop over all."""
        mean = None
        if step.kind == "layer":
            mean = f"mean_{value}"
            self._sum(value, step, where, mean, lambda x: x)
            self._say(f"{mean} = {mean} / {step.group}")
        inverse = f"inverse_{value}"
        self._sum(value, step, where, inverse, lambda x: self._squared(x, mean))
        self._say(f"{inverse} = 1.0 / tl.sqrt({inverse} / {step.group} + {step.eps!r})")
        self._statistics[value] = (mean, inverse)

    def _squared(self, x: str, mean: str | None) -> str:
        if mean is None:
            return f"{x} * {x}"
        return f"({x} - {mean}) * ({x} - {mean})"

    def _sum(self, value: int, step: Norm, where: list[_At], name: str, term: Callable[[str], str]) -> None:
        if where:
            x = self._value(step.x, where[0])
            self._say(f"{name} = tl.sum(tl.where({where[0].ok}, {term(x)}, 0.0), 1)[:, None]")
            return
        self._say(f"{name} = tl.zeros(m.shape, tl.float32)")
        at = self._loop(step.group, self.config.columns)
        x = self._value(step.x, at)
        self._say(f"{name} += tl.sum(tl.where({at.ok}, {term(x)}, 0.0), 1)[:, None]")
        self._indent -= 1

    def _loop(self, width: int, size: int) -> _At:
        """Begin a loop over ``width`` columns."""
        size = min(size, max(16, 1 << (width - 1).bit_length()))
        c = self._name("c")
        self._say(f"for base in tl.range(0, {width}, {size}):")
        self._indent += 1
        self._say(f"{c} = (base + tl.arange(0, {size}))[None, :]", f"{c}_inside = {c} < {width}")
        self._say(f"{c}_ok = (m < {self.spec.rows}) & {c}_inside")
        return _At(c, f"{c}_inside", f"{c}_ok")

    # ---- Values ------------------------------------------------------------------------------------------------------

    def _value(self, value: int, at: _At) -> str:
        """The name of a value's elements ``at`` some columns of the rows m, as float32."""
        key = (value, at)
        if key not in self._known:
            expression = self._expression(value, at)
            if not expression.isidentifier():
                name = self._name(f"v{value}")
                self._say(f"{name} = {expression}")
                expression = name
            self._known[key] = expression
        return self._known[key]

    def _expression(self, value: int, at: _At) -> str:
        width = self.widths[value]
        if value < self.first:
            return f"tl.load(in{value} + m * {width} + {at.column}, mask={at.ok}, other=0).to(tl.float32)"
        if value in self._stored:
            return f"tl.load({self._kept(value)} + m * {width} + {at.column}, mask={at.ok}, other=0)"
        step = self.spec.steps[value - self.first]
        if isinstance(step, Norm):
            return self._normalised(value, step, at, at.column)
        if isinstance(step, Activation):
            return FUNCTIONS[step.function].format(x=self._value(step.x, at))
        if isinstance(step, Multiply | Add):
            sign = "*" if isinstance(step, Multiply) else "+"
            return f"{self._value(step.x, at)} {sign} {self._value(step.y, at)}"
        if isinstance(step, Scale):
            return f"{self._value(step.x, at)} * {step.factor!r}"
        if isinstance(step, Rope):
            return self._rotated(step, at)
        if isinstance(step, Slice):
            column = self._derived(
                f"{at.column} // {step.size} * {step.group} + {step.start} + {at.column} % {step.size}"
            )
            return self._value(step.x, _At(column, at.inside, at.ok))
        if isinstance(step, Concat):
            return self._joined(step, at, width)
        assert isinstance(step, Gather)
        rows = self.spec.inputs[step.x].shape[0]
        index = self._derived(f"tl.load(in{step.index} + m, mask=m < {self.spec.rows}, other=-1)")
        found = self._derived(f"({index} >= 0) & ({index} < {rows})")
        x = f"tl.load(in{step.x} + {index} * {width} + {at.column}, mask={at.ok} & {found}, other=0).to(tl.float32)"
        # A row that does not exist is NaN rather than foreign memory.
        return f'tl.where({found}, {x}, float("nan"))'

    def _normalised(self, value: int, step: Norm, at: _At, column: str) -> str:
        mean, inverse = self._statistics[value]
        x = self._value(step.x, at)
        y = f"{x} * {inverse}" if mean is None else f"({x} - {mean}) * {inverse}"
        if step.weight is not None:
            weight = self._vector(step.weight, column, at)
            y = f"{y} * ({weight} + {step.offset!r})" if step.offset else f"{y} * {weight}"
        if step.bias is not None:
            y = f"{y} + {self._vector(step.bias, column, at)}"
        return y

    def _vector(self, value: int, column: str, at: _At) -> str:
        # The columns of a group of parts are told apart by the part, those of a vector are not.
        mask = at.inside if column == at.column else f"{column} < {self.widths[value]}"
        return f"tl.load(in{value} + {column}, mask={mask}, other=0).to(tl.float32)"

    def _rotated(self, step: Rope, at: _At) -> str:
        rows, d = self.spec.inputs[step.cos].shape
        half = d // 2
        inner = self._derived(f"{at.column} % {d}")
        partner = self._derived(f"tl.where({inner} < {half}, {at.column} + {half}, {at.column} - {half})")
        x, other = self._value(step.x, at), self._value(step.x, _At(partner, at.inside, at.ok))
        row, mask = (f"m * {d} + ", at.ok) if rows > 1 else ("", at.inside)
        cos, sin = (
            self._derived(f"tl.load(in{table} + {row}{inner}, mask={mask}, other=0).to(tl.float32)")
            for table in (step.cos, step.sin)
        )
        return f"{x} * {cos} + tl.where({inner} < {half}, -{other}, {other}) * {sin}"

    def _joined(self, step: Concat, at: _At, width: int) -> str:
        group, begin, found = width // step.groups, 0, ""
        inner = self._derived(f"{at.column} % {group}")
        for part in step.parts:
            size = self.widths[part] // step.groups
            here = self._derived(f"({inner} >= {begin}) & ({inner} < {begin + size})")
            column = self._derived(f"{at.column} // {group} * {size} + {inner} - {begin}")
            ok = self._derived(f"{at.ok} & {here}")
            inside = ok if at.inside == at.ok else self._derived(f"{at.inside} & {here}")
            x = self._value(part, _At(column, inside, ok))
            found = f"tl.where({here}, {x}, {found})" if found else x
            begin += size
        return found

    def _kept(self, value: int) -> str:
        return f"work + {self._stored[value]}" if self._stored[value] else "work"

    def _derived(self, expression: str) -> str:
        name = self._name("t")
        self._say(f"{name} = {expression}")
        return name

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}_{self._names}"

    def _say(self, *lines: str) -> None:
        self._jobs[-1].lines.extend("    " * self._indent + line for line in lines)
