"""Typed options from three places: ``options=`` wins over ``TORCHACCEL_<OPTION>``, which wins over a TOML file."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from torchaccel.calibration.plan import CalibrationPlan
from torchaccel.errors import OptionsError
from torchaccel.methods import FAMILIES, names
from torchaccel.passes.base import Method, Phase
from torchaccel.passes.calibrated import CalibratedMethod, is_missing, load_plan, missing_plan, needs_plan

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"kv_compression": "int8"},
}
EFFORTS = ("none", "quick", "full")
SETTINGS = ("strict", "fusion", "gate", "cache", "tune", "bundle", "trust")
KEYS = ("preset", *FAMILIES, *SETTINGS)
# The family whose methods can be named for prompts and for what follows them, and the graphs of each.
PHASED = "sparse_attention"
PHASES: dict[str, frozenset[Phase]] = {
    "prefill": frozenset({"prefill"}),
    "decode": frozenset({"extend", "decode"}),
}


@dataclass(frozen=True)
class Options:
    """What one compilation was asked to do: its methods in the order they rewrite, and where each value came from.

    strict: raise instead of declining. cache: the file of tuned timings, None for the default one. tune: effort spent
    on kernels that have no timings yet. bundle: what a deployment brings along; trust: also run the code in it.
    fusion: whether few-row layers run in fused kernels. gate: whether lossy sites that would be slower are declined.
    sources: option name -> "options", the environment variable, the file, or "preset:<name>".
    """

    methods: tuple[Method, ...]
    strict: bool
    sources: dict[str, str]
    cache: Path | None = None
    tune: Literal["none", "quick", "full"] = "none"
    bundle: Path | None = None
    trust: bool = False
    fusion: bool = True
    gate: bool = True

    def requested(self) -> dict[str, Any]:
        """The options as plain data: family -> {"method": name, every parameter with a value}, or a list of those."""
        found: dict[str, Any] = {}
        for method in self.methods:
            only = {"phase": method.phase} if method.phase else {}
            asked = {"method": method.name, **only, **method.options.model_dump(exclude_none=True)}
            before = found.get(method.family)
            found[method.family] = asked if before is None else [*_listed(before), asked]
        for key in SETTINGS:
            value = getattr(self, key)
            if value not in (None, "none", key in ("fusion", "gate")):  # the two switches that are on by default
                found[key] = str(value) if isinstance(value, Path) else value
        return found

    def with_plans(self, plans: Sequence[CalibrationPlan]) -> Options:
        """These options with plans, of those given, for the methods that have none; raises ``CalibrationError``."""

        def completed(method: Method) -> Method:
            makers = (method.name, *method.lenders) if isinstance(method, CalibratedMethod) else ()
            own = sorted((plan for plan in plans if plan.method in makers), key=lambda plan: makers.index(plan.method))
            if not own or not method.options.open_to_plan:
                if needs_plan(method):
                    raise missing_plan(method)
                return method
            given = method.options.model_dump(exclude_unset=True) | {"plan": own[0]}
            made = type(method)(type(method.options)(**given))
            made.phase, made.phases = method.phase, method.phases
            return made

        return replace(self, methods=tuple(completed(method) for method in self.methods))


def resolve(options: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> Options:
    """Combine the three places into typed options; raises ``OptionsError`` naming the key and what is allowed.

    Raises ``CalibrationError`` for a method without the plan that it needs, unless a bundle may bring it.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, tuple[Any, str]] = {}
    for found, where in (
        _from_file(environment.get("TORCHACCEL_CONFIG")),
        _from_environment(environment),
        _from_call(options),
    ):
        preset = found.pop("preset", None)
        if preset is not None:
            if preset not in PRESETS:
                raise _unknown("preset", preset, PRESETS)
            values.update({key: (value, f"preset:{preset}") for key, value in PRESETS[preset].items()})
        values.update({key: (value, where(key)) for key, value in found.items()})
    bundle = _path("bundle", values.get("bundle", (None, ""))[0])
    methods = []
    for family in FAMILIES:
        value, where_from = values.get(family, (None, ""))
        for one, phase in _entries(family, value, where_from):
            if one not in (None, False, "none"):
                methods.append(_method(family, one, where_from, phase, bundle is not None))
    sources = {key: where_from for key, (_, where_from) in values.items()}
    given = {key: value for key, (value, _) in values.items()}
    tune = given.get("tune", "none")
    if tune not in EFFORTS:
        raise _unknown("tune effort", tune, EFFORTS)
    return Options(
        tuple(methods),
        _flag("strict", given.get("strict", False)),
        sources,
        cache=_path("cache", given.get("cache")),
        tune=tune,
        bundle=bundle,
        trust=_flag("trust", given.get("trust", False)),
        fusion=_flag("fusion", given.get("fusion", True)),
        gate=_flag("gate", given.get("gate", True)),
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _entries(family: str, value: Any, where: str) -> list[tuple[Any, str | None]]:
    """Every method that was asked for, and the phase that it was asked for, None for all of its own."""
    if family == PHASED and isinstance(value, Mapping) and "method" not in value:
        for key in value:
            if key not in PHASES:
                raise _unknown(f"phase of {family} (from {where})", key, (*PHASES, "method"))
        return [(one, phase) for phase, given in value.items() for one in _many(given)]
    return [(one, None) for one in _many(value)]


def _many(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _from_call(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], Any]:
    if options is not None and not isinstance(options, Mapping):
        raise OptionsError(f"options must be a dict such as {{'kv_compression': 'int8'}}; found {options!r}")
    found = dict(options or {})
    _check_keys(found, "options=")
    return found, lambda key: "options"


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], Any]:
    found: dict[str, Any] = {}
    for key in KEYS:
        text = environment.get(f"TORCHACCEL_{key.upper()}")
        if text:
            found[key] = _parse(text)
    return found, lambda key: f"TORCHACCEL_{key.upper()}"


def _from_file(path: str | None) -> tuple[dict[str, Any], Any]:
    if not path:
        return {}, lambda key: ""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionsError(f"TORCHACCEL_CONFIG names {path!r}, which cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionsError(f"TORCHACCEL_CONFIG names {path!r}, which is not valid TOML: {error}") from error
    _check_keys(found, path)
    return found, lambda key: path


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _check_keys(found: Mapping[str, Any], where: str) -> None:
    for key in found:
        if key not in KEYS:
            raise _unknown(f"option of {where}", key, KEYS)


def _method(family: str, value: Any, where: str, phase: str | None, bundled: bool) -> Method:
    """The method asked for; phase: the only one it treats, if any. bundled: whether a bundle may bring its plan."""
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
        raise OptionsError(
            f"{family} (from {where}) must be a method's name or {{'method': name, ...}}; found {value!r}; "
            f"methods: {', '.join(method.name for method in FAMILIES[family])}"
        )
    parameters = {key: item for key, item in value.items() if key != "method"}
    if family == PHASED:
        phase = parameters.pop("phase", phase)
    known = names(family)
    if value["method"] not in known:
        raise _unknown(f"{family} method", value["method"], known)
    method = known[value["method"]]
    fields = method.Options.model_fields
    for key in parameters:
        if key not in fields:
            raise _unknown(f"parameter of {family} method {method.name!r}", key, fields)
    if isinstance(parameters.get("plan"), (str, Path)):
        if bundled and is_missing(parameters["plan"]):
            del parameters["plan"]  # a deployment needs no file besides its bundle
        else:
            parameters["plan"] = load_plan(parameters["plan"])
    try:
        made = method(method.Options(**parameters))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise OptionsError(f"{family}.{key} (from {where}): {first['msg']}; found {first['input']!r}") from error
    if needs_plan(made) and not bundled:
        raise missing_plan(made)
    if phase is not None:
        _keep_to(made, phase, where)
    return made


def _keep_to(method: Method, phase: str, where: str) -> None:
    """Let a method treat the graphs of one of ``PHASES`` only."""
    if phase not in PHASES:
        raise _unknown(f"phase of {method.family} method {method.name!r} (from {where})", phase, PHASES)
    if not method.sparse_in(PHASES[phase]):
        there = ", ".join(name for name, graphs in PHASES.items() if method.sparse_in(graphs))
        instead = (
            f"name it for {there}" if there else f"it is for {', '.join(method.phases)} graphs alone: name no phase"
        )
        raise OptionsError(
            f"{method.family} (from {where}) asks for {method.name!r} in {phase}, where it reads everything; {instead}"
        )
    method.keep_to(phase, PHASES[phase])


def _flag(key: str, value: Any) -> bool:
    if value in (True, False, 0, 1):
        return bool(value)
    raise OptionsError(f"{key} must be true or false; found {value!r}")


def _path(key: str, value: Any) -> Path | None:
    if value is None or (isinstance(value, (str, Path)) and str(value)):
        return None if value is None else Path(value).expanduser()
    raise OptionsError(f"{key} must be the path of a file; found {value!r}")


def _unknown(what: str, found: Any, known: Any) -> OptionsError:
    near = difflib.get_close_matches(str(found), [str(name) for name in known], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return OptionsError(f"unknown {what} {found!r}{hint} Known: {', '.join(str(name) for name in known) or 'none'}")
