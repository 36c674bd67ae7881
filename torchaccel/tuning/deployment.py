"""What compilations of a process know beforehand: the bundle, loaded once, and the tuning cache."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torchaccel.calibration.plan import CalibrationPlan, plan_from_bytes
from torchaccel.cost.facts import DeviceFacts
from torchaccel.errors import BundleError, CacheWarning, CalibrationError

from . import code
from .bundle import Bundle, read_bundle
from .cache import TuningCache, default_path
from .fingerprint import fingerprint
from .record import Record
from .tuned import Tuned
from .tuner import Effort, Task, Tuner

# What the option "tune" may spend on one graph while it is compiled.
BUDGET_SECONDS = 120.0


@dataclass(frozen=True)
class Brought:
    """What was taken from a bundle: its records, its calibration plans, and why its code was not, None if it was."""

    records: tuple[Record, ...] = ()
    plans: tuple[CalibrationPlan, ...] = ()
    refused: str | None = "there is no bundle"


class Deployment:
    """Loads bundles, each once, and opens the cache."""

    def __init__(self) -> None:
        self._brought: dict[tuple[Path, bool, torch.device], Brought] = {}

    def bring(self, path: Path | None, trust: bool, device: torch.device, *, strict: bool = False) -> Brought:
        """The bundle at ``path``, used as far as it may be, with a warning that says what was not and why.

        Its code runs only if its manifest verifies, ``trust`` is set, and it was made for this device. ``strict`` turns
        the warning into a ``BundleError``.
        """
        if path is None:
            return Brought()
        key = path, trust, device
        if key not in self._brought:
            brought = _bring(path, trust, device)
            if brought.refused is not None:
                if strict:
                    raise BundleError(brought.refused)
                warnings.warn(brought.refused, CacheWarning, stacklevel=2)
            self._brought[key] = brought
        return self._brought[key]

    @contextlib.contextmanager
    def settings(self, brought: Brought) -> Iterator[None]:
        """Compile as the bundle was compiled, if its code is used."""
        with contextlib.nullcontext() if brought.refused else code.settings():
            yield

    def tuned(self, cache: Path | None, brought: Brought, device: torch.device) -> Tuned:
        """What was measured on this device: by the cache at ``cache`` (None: the default) and in the bundle."""
        return Tuned.open(cache, device, bundled=brought.records)

    def facts(self, cache: Path | None, device: torch.device) -> DeviceFacts | None:
        """What was measured about this device and kept in the cache; None when nothing was."""
        found = TuningCache(cache or default_path()).facts(fingerprint(device))
        try:
            return None if found is None else DeviceFacts.from_dict(found)
        except (TypeError, ValueError):
            return None  # of another version of torchaccel

    def tune(self, tasks: Sequence[Task], cache: Path | None, effort: Effort, device: torch.device) -> bool:
        """Measure the kernels of a rewritten graph that the cache does not know; whether anything is known now."""
        tuner = Tuner(TuningCache(cache or default_path()), device, effort=effort, budget=BUDGET_SECONDS)
        return bool(tuner.run(tasks).records)


def _bring(path: Path, trust: bool, device: torch.device) -> Brought:
    try:
        bundle = read_bundle(path)
        plans = tuple(plan_from_bytes(content, f"{path}:{method}") for method, content in bundle.calibration.items())
    except (BundleError, CalibrationError) as error:
        return Brought(refused=f"{error}. Nothing of it is used")
    refused = _refusal(path, bundle, trust, device)
    if refused is None and bundle.has_code:
        try:
            code.install(bundle.kernels, bundle.artifacts)
        except (OSError, RuntimeError, ValueError) as error:
            refused = f"the compiled code of {path} cannot be installed ({error}); it is compiled again"
    return Brought(bundle.tuned, plans, refused)


def _refusal(path: Path, bundle: Bundle, trust: bool, device: torch.device) -> str | None:
    """Why the code of a verified bundle is not run, in words for the user."""
    if not bundle.has_code:
        return None
    differences = fingerprint(device).differences(bundle.fingerprint) or bundle.toolchain_differences(code.toolchain())
    portable = "Its timings and calibration are used; what it would have brought is compiled here"
    if differences:
        lines = "\n  ".join(differences)
        return f"the compiled code of {path} was made for another device or toolchain:\n  {lines}\n{portable}"
    if not trust:
        return (
            f"{path} brings compiled code, which is not run unless you trust whoever made it: "
            f"options={{'bundle': ..., 'trust': True}}. {portable}"
        )
    return None
