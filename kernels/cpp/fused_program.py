"""The order in which a fused program runs in C++, where its values lie, and the statements of its body."""

from __future__ import annotations

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
    Step,
    reads,
)


def padded(width: int) -> int:
    """Floats from one row of a value to the next."""
    return -(-width // 32) * 32


class Program:
    """The schedule of a spec: layers in phases, each as early as its input is known, barriers between the phases.

    own: floats of scratch per thread. shared: floats that all threads write to. body: C++ statements.
    """

    def __init__(self, spec: FusedSpec):
        self.spec = spec
        self.first = len(spec.inputs)
        self.widths = spec.widths()
        self.own = 0
        self.shared = 0
        self.body: list[str] = []
        self.returned = {out.value: place for place, out in enumerate(spec.outputs)}
        self.read = {value for step in spec.steps for value in reads(step)}
        self._ready: set[int] = set()
        self._packed: dict[tuple[int, bool, float | None], str] = {}
        self._emit()

    def _emit(self) -> None:
        levels = [0] * self.first
        for step in self.spec.steps:
            levels.append(max(levels[value] for value in reads(step)) + isinstance(step, Linear))
        steps = list(zip(range(self.first, len(levels)), self.spec.steps, levels[self.first :], strict=True))
        for phase in range(max(levels) + 1):
            linears = [(i, step) for i, step, level in steps if level == phase and isinstance(step, Linear)]
            if linears:
                self._layers(phase, linears)
            if any(value in self.read for value, _ in linears):
                following = [step for _, step, level in steps if level == phase + 1 and isinstance(step, Linear)]
                self._announce(following[:1])
                self._say("#pragma omp barrier", "")
            for value, step, level in steps:
                if level == phase:
                    if not isinstance(step, Linear):
                        self._step(value, step)
                    self._return(value)

    def _announce(self, layers: list[Linear]) -> None:
        for step in layers:
            n, k = self.spec.inputs[step.weight].shape
            if not step.by_columns:
                self._say(f"announce<{n}, {k}>({self._input(step.weight)}, thread, threads);")

    def _layers(self, phase: int, linears: list[tuple[int, Linear]]) -> None:
        packs = [self._pack(step) for _, step in linears]
        self._say(f"// Layers {phase}: {', '.join(f'v{value}' for value, _ in linears)}")
        for (value, step), packed in zip(linears, packs, strict=True):
            n, k = self.spec.inputs[step.weight].shape
            n, k = (k, n) if step.by_columns else (n, k)
            if value in self.read:
                target, distance = f"v{value}", padded(n)
                self._say(f"float* const v{value} = shared + {self.shared};")
                self.shared += padded(n) * self.spec.rows
            else:
                target, distance = f"reinterpret_cast<T*>(args.out{self.returned[value]})", n
            bias = "nullptr" if step.bias is None else self._input(step.bias)
            name = f"project<{n}, {k}>"
            if step.by_columns:
                name = f"project_columns<{n}, {k}, {'true' if step.threshold is not None else 'false'}>"
            self._say(f"{name}({target}, {distance}, {packed}, {self._input(step.weight)}, {bias}, thread, threads);")

    def _pack(self, step: Linear) -> str:
        """The name of a linear layer's input in the form its products take."""
        self._load(step.x)
        width, key = self.widths[step.x], (step.x, step.by_columns, step.threshold)
        if key not in self._packed:
            name = f"x{step.x}_{len(self._packed)}"
            threshold = "-1.0f" if step.threshold is None else _float(step.threshold)
            scratch = self._scratch(padded(width) * self.spec.rows)
            if step.by_columns:
                self._say(f"float* const {name} = {scratch};", f"round_rows<{width}>({name}, v{step.x}, {threshold});")
            else:
                self._say(
                    f"X* const {name} = reinterpret_cast<X*>({scratch});",
                    f"pack<{width}>({name}, v{step.x}, {threshold});",
                )
            self._packed[key] = name
        return self._packed[key]

    def _step(self, value: int, step: Step) -> None:
        for source in reads(step):
            if not isinstance(step, Gather):
                self._load(source)
        n = self.widths[value]
        self._say(f"float* const v{value} = {self._scratch(padded(n) * self.spec.rows)};")
        if isinstance(step, Norm):
            weight, bias = ("nullptr" if i is None else self._input(i) for i in (step.weight, step.bias))
            centered = "true" if step.kind == "layer" else "false"
            call = f"norm<{n}, {step.group}, {centered}>(v{value}, v{step.x}, {weight}, {bias}, "
            self._say(call + f"{_float(step.eps)}, {_float(step.offset)});")
        elif isinstance(step, Activation):
            self._say(f"map<{n}>(v{value}, [](const Vec& x) {{ return {step.function}(x); }}, v{step.x});")
        elif isinstance(step, Multiply | Add):
            sign = "*" if isinstance(step, Multiply) else "+"
            function = f"[](const Vec& x, const Vec& y) {{ return x {sign} y; }}"
            self._say(f"map<{n}>(v{value}, {function}, v{step.x}, v{step.y});")
        elif isinstance(step, Scale):
            self._say(f"map<{n}>(v{value}, [](const Vec& x) {{ return x * Vec({_float(step.factor)}); }}, v{step.x});")
        elif isinstance(step, Rope):
            rows, d = self.spec.inputs[step.cos].shape
            one = "true" if rows == 1 else "false"
            tables = f"{self._input(step.cos)}, {self._input(step.sin)}"
            self._say(f"rope<{n}, {d}, {one}>(v{value}, v{step.x}, {tables});")
        elif isinstance(step, Slice):
            width = self.widths[step.x]
            place = f"place<{width}, {step.group}, {step.start}, {step.size}, {n}, {step.size}, 0>"
            self._say(f"{place}(v{value}, v{step.x});")
        elif isinstance(step, Concat):
            at, group = 0, n // step.groups
            for part in step.parts:
                size = self.widths[part] // step.groups
                self._say(f"place<{self.widths[part]}, {size}, 0, {size}, {n}, {group}, {at}>(v{value}, v{part});")
                at += size
        elif isinstance(step, Gather):
            rows, index = self.spec.inputs[step.x].shape[0], f"reinterpret_cast<const int64_t*>(args.in{step.index})"
            self._say(f"gather<{n}, {rows}>(v{value}, {self._input(step.x)}, {index});")

    def _return(self, value: int) -> None:
        place = self.returned.get(value)
        if place is None or (isinstance(self.spec.steps[value - self.first], Linear) and value not in self.read):
            return
        target = f"reinterpret_cast<T*>(args.out{place})"
        self._say(f"if (thread == {place} % threads) store<{self.widths[value]}>({target}, v{value});")

    def _load(self, value: int) -> None:
        """Brings the rows of an input into floats, once."""
        if value < self.first and self.spec.inputs[value].kind == "rows" and value not in self._ready:
            self._ready.add(value)
            width = self.widths[value]
            self._say(
                f"float* const v{value} = {self._scratch(padded(width) * self.spec.rows)};",
                f"load<{width}>(v{value}, {self._input(value)});",
            )

    def _input(self, value: int) -> str:
        return f"reinterpret_cast<const T*>(args.in{value})"

    def _scratch(self, floats: int) -> str:
        self.own += floats
        return f"own + {self.own - floats}"

    def _say(self, *lines: str) -> None:
        self.body += [line if line.startswith("#") or not line else f"  {line}" for line in lines]


def _float(value: float) -> str:
    return f"{value!r}f" if "." in repr(value) or "e" in repr(value) else f"{value!r}.0f"
