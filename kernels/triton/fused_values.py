"""Values of a fused program in Triton: the statements that compute their elements at some rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..fused_spec import Activation, Add, Concat, FusedSpec, Gather, Multiply, Norm, Rope, Scale, Slice, reads

FUNCTIONS = {
    "silu": "{x} * tl.sigmoid({x})",
    "gelu": "0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))",
    "gelu_tanh": "{x} * tl.sigmoid(1.5957691216057308 * {x} * (1.0 + 0.044715 * {x} * {x}))",
    "relu": "tl.where({x} < 0, 0.0, {x})",
    "sigmoid": "tl.sigmoid({x})",
    "tanh": "1.0 - 2.0 / (1.0 + tl.exp(2.0 * {x}))",
}


@dataclass(frozen=True)
class At:
    """Where a value is wanted: names of its columns, of which columns exist, and of which elements do."""

    column: str
    inside: str
    ok: str


class Body:
    """The statements of a function, and names of what they have computed: elements of the rows ``m``.

    stored: where the values begin that lie in memory. made: those computed by programs of their own. columns: of a step
    over a whole row.
    """

    def __init__(self, spec: FusedSpec, stored: Mapping[int, int], made: set[int], columns: int):
        self.spec = spec
        self.first = len(spec.inputs)
        self.widths = spec.widths()
        self.stored = stored
        self.made = made
        self.columns = columns
        self.lines: list[str] = []
        self.indent = 1
        self._known: dict[tuple[int, At], str] = {}
        self._statistics: dict[int, tuple[str | None, str]] = {}
        self._names = 0

    def say(self, *lines: str) -> None:
        """Add statements."""
        self.lines += ["    " * self.indent + line for line in lines]

    def derived(self, expression: str) -> str:
        """A name for an expression."""
        name = self._name("t")
        self.say(f"{name} = {expression}")
        return name

    def place(self, value: int) -> str:
        """Where a stored value begins."""
        return f"work + {self.stored[value]}" if self.stored[value] else "work"

    # ---- Statistics of norms of whole rows ---------------------------------------------------------------------------

    def prepare(self, values: list[int], at: At | None = None, width: int = 0) -> None:
        """Compute the statistics that ``values`` need; of rows of ``width`` at ``at``, which holds them whole."""
        for value in self._inline_norms(values):
            step = self.spec.steps[value - self.first]
            assert isinstance(step, Norm)
            self.reduce(value, step, [at] if at is not None and self.widths[value] == width else [])

    def _inline_norms(self, values: list[int]) -> list[int]:
        found: set[int] = set()

        def visit(value: int) -> None:
            if value < self.first or value in self.stored:
                return
            step = self.spec.steps[value - self.first]
            for source in reads(step):
                visit(source)
            if isinstance(step, Norm) and value not in self.made:
                found.add(value)

        for value in values:
            visit(value)
        return sorted(found)

    def reduce(self, value: int, step: Norm, where: list[At]) -> None:
        """Mean and inverse deviation: of the columns that ``where`` holds, or in a loop over all."""
        mean = None
        if step.kind == "layer":
            mean = f"mean_{value}"
            self._sum(value, step, where, mean, lambda x: x)
            self.say(f"{mean} = {mean} / {step.group}")
        inverse = f"inverse_{value}"
        self._sum(value, step, where, inverse, lambda x: self._squared(x, mean))
        self.say(f"{inverse} = 1.0 / tl.sqrt({inverse} / {step.group} + {step.eps!r})")
        self._statistics[value] = (mean, inverse)

    def _squared(self, x: str, mean: str | None) -> str:
        if mean is None:
            return f"{x} * {x}"
        return f"({x} - {mean}) * ({x} - {mean})"

    def _sum(self, value: int, step: Norm, where: list[At], name: str, term: Callable[[str], str]) -> None:
        if where:
            x = self.value(step.x, where[0])
            self.say(f"{name} = tl.sum(tl.where({where[0].ok}, {term(x)}, 0.0), 1)[:, None]")
            return
        self.say(f"{name} = tl.zeros(m.shape, tl.float32)")
        at = self.loop(step.group, self.columns)
        x = self.value(step.x, at)
        self.say(f"{name} += tl.sum(tl.where({at.ok}, {term(x)}, 0.0), 1)[:, None]")
        self.indent -= 1

    def loop(self, width: int, size: int) -> At:
        """Begin a loop over ``width`` columns."""
        size = min(size, max(16, 1 << (width - 1).bit_length()))
        c = self._name("c")
        self.say(f"for base in tl.range(0, {width}, {size}):")
        self.indent += 1
        self.say(f"{c} = (base + tl.arange(0, {size}))[None, :]", f"{c}_inside = {c} < {width}")
        self.say(f"{c}_ok = (m < {self.spec.rows}) & {c}_inside")
        return At(c, f"{c}_inside", f"{c}_ok")

    # ---- Values ------------------------------------------------------------------------------------------------------

    def value(self, value: int, at: At) -> str:
        """The name of a value's elements ``at`` some columns of the rows m, as float32."""
        key = (value, at)
        if key not in self._known:
            expression = self._expression(value, at)
            if not expression.isidentifier():
                name = self._name(f"v{value}")
                self.say(f"{name} = {expression}")
                expression = name
            self._known[key] = expression
        return self._known[key]

    def _expression(self, value: int, at: At) -> str:
        width = self.widths[value]
        if value < self.first:
            return f"tl.load(in{value} + m * {width} + {at.column}, mask={at.ok}, other=0).to(tl.float32)"
        if value in self.stored:
            return f"tl.load({self.place(value)} + m * {width} + {at.column}, mask={at.ok}, other=0)"
        step = self.spec.steps[value - self.first]
        if isinstance(step, Norm):
            return self.normalised(value, step, at, at.column)
        if isinstance(step, Activation):
            return FUNCTIONS[step.function].format(x=self.value(step.x, at))
        if isinstance(step, Multiply | Add):
            sign = "*" if isinstance(step, Multiply) else "+"
            return f"{self.value(step.x, at)} {sign} {self.value(step.y, at)}"
        if isinstance(step, Scale):
            return f"{self.value(step.x, at)} * {step.factor!r}"
        if isinstance(step, Rope):
            return self._rotated(step, at)
        if isinstance(step, Slice):
            column = self.derived(
                f"{at.column} // {step.size} * {step.group} + {step.start} + {at.column} % {step.size}"
            )
            return self.value(step.x, At(column, at.inside, at.ok))
        if isinstance(step, Concat):
            return self._joined(step, at, width)
        assert isinstance(step, Gather)
        rows = self.spec.inputs[step.x].shape[0]
        index = self.derived(f"tl.load(in{step.index} + m, mask=m < {self.spec.rows}, other=-1)")
        found = self.derived(f"({index} >= 0) & ({index} < {rows})")
        x = f"tl.load(in{step.x} + {index} * {width} + {at.column}, mask={at.ok} & {found}, other=0).to(tl.float32)"
        # A row that does not exist is NaN rather than foreign memory.
        return f'tl.where({found}, {x}, float("nan"))'

    def normalised(self, value: int, step: Norm, at: At, column: str) -> str:
        """A norm's elements, once ``reduce`` has said its statistics; ``column`` numbers those of weight and bias."""
        mean, inverse = self._statistics[value]
        x = self.value(step.x, at)
        y = f"{x} * {inverse}" if mean is None else f"({x} - {mean}) * {inverse}"
        if step.weight is not None:
            weight = self._vector(step.weight, column, at)
            y = f"{y} * ({weight} + {step.offset!r})" if step.offset else f"{y} * {weight}"
        if step.bias is not None:
            y = f"{y} + {self._vector(step.bias, column, at)}"
        return y

    def _vector(self, value: int, column: str, at: At) -> str:
        # The columns of a group of parts are told apart by the part, those of a vector are not.
        mask = at.inside if column == at.column else f"{column} < {self.widths[value]}"
        return f"tl.load(in{value} + {column}, mask={mask}, other=0).to(tl.float32)"

    def _rotated(self, step: Rope, at: At) -> str:
        rows, d = self.spec.inputs[step.cos].shape
        half = d // 2
        inner = self.derived(f"{at.column} % {d}")
        partner = self.derived(f"tl.where({inner} < {half}, {at.column} + {half}, {at.column} - {half})")
        x, other = self.value(step.x, at), self.value(step.x, At(partner, at.inside, at.ok))
        row, mask = (f"m * {d} + ", at.ok) if rows > 1 else ("", at.inside)
        cos, sin = (
            self.derived(f"tl.load(in{table} + {row}{inner}, mask={mask}, other=0).to(tl.float32)")
            for table in (step.cos, step.sin)
        )
        return f"{x} * {cos} + tl.where({inner} < {half}, -{other}, {other}) * {sin}"

    def _joined(self, step: Concat, at: At, width: int) -> str:
        group, begin, found = width // step.groups, 0, ""
        inner = self.derived(f"{at.column} % {group}")
        for part in step.parts:
            size = self.widths[part] // step.groups
            here = self.derived(f"({inner} >= {begin}) & ({inner} < {begin + size})")
            column = self.derived(f"{at.column} // {group} * {size} + {inner} - {begin}")
            ok = self.derived(f"{at.ok} & {here}")
            inside = ok if at.inside == at.ok else self.derived(f"{at.inside} & {here}")
            x = self.value(part, At(column, inside, ok))
            found = f"tl.where({here}, {x}, {found})" if found else x
            begin += size
        return found

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}_{self._names}"
