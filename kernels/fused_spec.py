"""What a fused kernel computes for a few rows: a short program of norms, linear layers and what stands between them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"]


@dataclass(frozen=True)
class Input:
    """A tensor the kernel reads, contiguous.

    kind and shape: "rows" ``[R, width]`` (R is the spec's rows, but for what a ``Gather`` reads), "weight" ``[N, K]``
    or, for a ``Linear`` by columns, ``[K, N]``, "vector" ``[N]``, "table" ``[rows | 1, D]``, "index" ``[rows]`` (int64;
    all others are of the spec's dtype).
    """

    kind: Literal["rows", "weight", "vector", "table", "index"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(var + eps)`` ("layer") or ``x / sqrt(mean(x^2) + eps)`` ("rms").

    That times weight + offset, plus bias. Statistics are of every ``group`` columns; weight and bias are ``[group]``
    vectors or None.
    """

    x: int
    kind: Literal["rms", "layer"]
    group: int
    eps: float
    weight: int | None = None
    bias: int | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Linear:
    """``x @ W.T + b`` with W ``[N, K]``; ``x @ W + b`` with W ``[K, N]`` where ``by_columns``.

    ``threshold``: elements of x with an absolute value up to it count as zero (activation sparsity), and by columns
    their weights are not read. None, the default, is exact.
    """

    x: int
    weight: int
    bias: int | None = None
    by_columns: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class Activation:
    """``f(x)``, element by element."""

    x: int
    function: ActivationName


@dataclass(frozen=True)
class Multiply:
    """``x * y`` of equal widths."""

    x: int
    y: int


@dataclass(frozen=True)
class Add:
    """``x + y`` of equal widths: a residual."""

    x: int
    y: int


@dataclass(frozen=True)
class Scale:
    """``x * factor``."""

    x: int
    factor: float


@dataclass(frozen=True)
class Rope:
    """``x * cos + rotate_half(x) * sin`` of every head (rotary position embedding, arXiv:2104.09864).

    cos, sin: tables ``[rows | 1, D]``; a head is D columns.
    """

    x: int
    cos: int
    sin: int


@dataclass(frozen=True)
class Slice:
    """Columns ``start .. start + size`` of every ``group`` columns."""

    x: int
    group: int
    start: int
    size: int


@dataclass(frozen=True)
class Concat:
    """The parts side by side within each of ``groups`` equal groups of columns."""

    parts: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Gather:
    """Rows ``index[m]`` of an input of kind "rows"."""

    x: int
    index: int


Step = Norm | Linear | Activation | Multiply | Add | Scale | Rope | Slice | Concat | Gather
STEPS: dict[str, type[Step]] = {
    kind.__name__: kind for kind in (Norm, Linear, Activation, Multiply, Add, Scale, Rope, Slice, Concat, Gather)
}


@dataclass(frozen=True)
class Output:
    """A value the kernel returns, and the shape in which it does: ``rows`` times the value's width elements."""

    value: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FusedSpec:
    """A program over matrices of ``rows`` rows: value i is input i, then step ``i - len(inputs)``.

    A step reads earlier values only. Values are float32 inside, but for the input of a linear layer, which is rounded
    to ``dtype`` as the multiplication takes it; inputs and outputs are ``dtype``.
    """

    dtype: str
    rows: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]

    def key(self) -> str:
        """Canonical JSON of the spec: the string that custom ops carry and caches are keyed by."""
        fields = asdict(self)
        fields["steps"] = [{"op": type(step).__name__, **asdict(step)} for step in self.steps]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> FusedSpec:
        """The spec whose ``key()`` is ``key``."""
        return _fused_spec(key)

    def widths(self) -> tuple[int, ...]:
        """Columns of every value; those of vectors and indexes are their length."""
        found = [item.shape[-1] for item in self.inputs]
        for step in self.steps:
            found.append(_width(self, step, found))
        return tuple(found)

    def listing(self) -> list[str]:
        """The program, one line per input, step and output."""
        widths, first = self.widths(), len(self.inputs)
        lines = [f"in{i}: {item.kind} {list(item.shape)}" for i, item in enumerate(self.inputs)]
        lines += [f"v{value} [{widths[value]}] = {step}" for value, step in enumerate(self.steps, first)]
        return lines + [f"out{i}: v{out.value} as {list(out.shape)}" for i, out in enumerate(self.outputs)]


def reads(step: Step) -> tuple[int, ...]:
    """The numbers of the values a step reads, parameters included."""
    if isinstance(step, Concat):
        return step.parts
    names = ("x", "y", "weight", "bias", "cos", "sin", "index")
    found = [getattr(step, field.name) for field in fields(step) if field.name in names]
    return tuple(value for value in found if value is not None)


def _width(spec: FusedSpec, step: Step, widths: list[int]) -> int:
    if isinstance(step, Linear):
        n, k = spec.inputs[step.weight].shape
        return k if step.by_columns else n
    if isinstance(step, Slice):
        return widths[step.x] // step.group * step.size
    if isinstance(step, Concat):
        return sum(widths[part] for part in step.parts)
    return widths[step.x]


@lru_cache(maxsize=4096)
def _fused_spec(key: str) -> FusedSpec:
    fields: dict[str, Any] = json.loads(key)
    steps: list[Step] = []
    for item in fields["steps"]:
        kind = STEPS[item.pop("op")]
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items()}
        steps.append(kind(**arguments))
    return FusedSpec(
        dtype=fields["dtype"],
        rows=fields["rows"],
        inputs=tuple(Input(item["kind"], tuple(item["shape"])) for item in fields["inputs"]),
        steps=tuple(steps),
        outputs=tuple(Output(item["value"], tuple(item["shape"])) for item in fields["outputs"]),
    )
