"""A calibration plan: the tensors a calibrated method needs, and what they were made for, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from torchaccel.errors import CalibrationError

from .identity import ModelIdentity

FORMAT = 1
# The one key of the file's metadata, which safetensors keeps as texts, of several in any order.
FACTS = "torchaccel_plan"


@dataclass(frozen=True, eq=False)
class CalibrationPlan:
    """What calibrating ``method`` with ``options`` gave for one model; plans of equal content are equal.

    options: the method's, without its plan. tensors: by name, any dtypes; whose names and shapes the method knows.
    version: of torchaccel. source: where it was read from, for messages. digest: SHA-256 of all but the source.
    """

    method: str
    options: Mapping[str, Any]
    model: ModelIdentity
    tensors: Mapping[str, Tensor]
    version: str
    source: str = field(default="a plan in memory")
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _sha256(self._facts(), self.tensors))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrationPlan) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"CalibrationPlan({self.method!r}, {self.source!r}, sha256={self.digest[:16]})"

    def __deepcopy__(self, memo: Any) -> CalibrationPlan:
        return self

    @property
    def described(self) -> str:
        """The plan, in words for a message."""
        return f"the calibration plan {self.source} of method {self.method!r}"

    def to_bytes(self) -> bytes:
        """The content of the file."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return save(tensors, {FACTS: json.dumps({**json.loads(self._facts()), "sha256": self.digest}, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        """Write the plan, under a temporary name until it is complete."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_bytes(self.to_bytes())
        partial.replace(target)

    def _facts(self) -> str:
        found = {
            "format": FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "model": self.model.to_dict(),
            "version": self.version,
        }
        return json.dumps(found, sort_keys=True)


def read_plan(path: str | Path) -> CalibrationPlan:
    """The plan in a file; raises ``CalibrationError`` for a file that is none, or is damaged."""
    found = Path(path).expanduser()
    try:
        now = found.stat()
        # Options are resolved for every graph of a model; its plan is read once.
        return _read(found, now.st_mtime_ns, now.st_size)
    except OSError as error:
        raise CalibrationError(
            f"the calibration plan {str(path)!r} cannot be read ({error.strerror}); make one with torchaccel calibrate"
        ) from error


@lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int) -> CalibrationPlan:
    return plan_from_bytes(path.read_bytes(), str(path))


def plan_from_bytes(content: bytes, source: str) -> CalibrationPlan:
    """The plan whose file has this content; source: where it is from. Raises ``CalibrationError`` as ``read_plan``."""
    try:
        # The header: its length in 8 bytes, then JSON, in which the metadata stands under one name.
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        tensors = load(content)
        facts = json.loads(metadata[FACTS])
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CalibrationError(
            f"{source} is no calibration plan ({type(error).__name__}: {error}); make one with torchaccel calibrate"
        ) from error
    if facts.get("format") != FORMAT:
        raise CalibrationError(
            f"the calibration plan {source} has format {facts.get('format')!r}, this version of torchaccel reads "
            f"format {FORMAT}; calibrate anew"
        )
    try:
        model = ModelIdentity.from_dict(facts["model"])
        plan = CalibrationPlan(facts["method"], facts["options"], model, tensors, facts["version"], source)
    except (KeyError, TypeError) as error:
        raise CalibrationError(f"the calibration plan {source} lacks facts ({error}); calibrate anew") from error
    if plan.digest != facts.get("sha256"):
        raise CalibrationError(
            f"the calibration plan {source} is damaged: its SHA-256 is {plan.digest}, it says "
            f"{facts.get('sha256')}; copy it again or calibrate anew"
        )
    return plan


def _sha256(facts: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
