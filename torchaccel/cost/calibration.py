"""How far implementations stay behind the roofline: a few numbers for each, from measurements or from experience."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..kernels.candidates import Candidate, Spec, kernel_name
from ..kernels.spec import AttentionSpec

SHIPPED = Path(__file__).parent / "calibration.json"
VERSION = 1


@dataclass(frozen=True)
class Coefficients:
    """What one implementation of a kernel costs beyond bytes over bandwidth and FLOPs over the rate of GEMMs.

    memory, cache, flops: factors over the ideal times of reading memory or, instead, a cache that holds everything, and
    of products. row_ns, code_ns: time of one processor for a (query head, key) pair of the softmax, and for a decoded
    number. launch: factor over the device's launches and forks. piece_us: merging one partial result. call_us: what a
    call costs once.
    """

    memory: float = 1.0
    cache: float = 1.0
    flops: float = 1.0
    row_ns: float = 0.0
    code_ns: float = 0.0
    launch: float = 1.0
    piece_us: float = 0.0
    call_us: float = 0.0


# Where nothing was measured. GPUs: long streams reach 85 to 92 % of DRAM bandwidth, generated attention 50 to 60 % of
# the tensor cores' rate (figures of published kernels, not measured by this project).
UNMEASURED = {"cpu": Coefficients(1.1, 1.1, 1.5, 0.3, 0.05), "cuda": Coefficients(1.14, 1.14, 1.8)}


def calibration_key(spec: Spec, candidate: Candidate, kind: str) -> str:
    """What shares coefficients: "device kind/implementation/kernel/format", such as "cpu/cpp/decode_attention/int8"."""
    form = spec.dtype
    if isinstance(spec, AttentionSpec):
        form = next((f.kind for f in (spec.key_format, spec.value_format) if f.is_quantised), spec.dtype)
    return f"{kind}/{candidate.implementation}/{kernel_name(spec)}/{form}"


@dataclass(frozen=True)
class Calibration:
    """Coefficients by ``calibration_key``, and a word on where they were measured."""

    entries: Mapping[str, Coefficients]
    source: str = ""

    def of(self, spec: Spec, candidate: Candidate, kind: str) -> Coefficients:
        """The coefficients of a candidate: its own, else those of the same kernel in another format, else a default."""
        key = calibration_key(spec, candidate, kind)
        found = self.entries.get(key)
        if found is None:
            family = key.rpartition("/")[0] + "/"
            found = next((self.entries[name] for name in sorted(self.entries) if name.startswith(family)), None)
        return UNMEASURED[kind] if found is None else found

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON values, numbers to four digits."""
        entries = {key: {k: float(f"{v:.4g}") for k, v in asdict(c).items()} for key, c in sorted(self.entries.items())}
        return {"version": VERSION, "source": self.source, "entries": entries}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Calibration:
        """The calibration whose ``to_dict`` is ``found``; raises ``ValueError`` for another version or other fields."""
        if found.get("version") != VERSION:
            raise ValueError(
                f"a calibration of version {VERSION} is needed; found {found.get('version')!r}: fit it again"
            )
        names = {field.name for field in fields(Coefficients)}
        for key, values in found["entries"].items():
            if set(values) != names:
                raise ValueError(
                    f"coefficients of {key} are {', '.join(sorted(names))}; found {', '.join(sorted(values))}"
                )
        return Calibration({key: Coefficients(**v) for key, v in found["entries"].items()}, str(found["source"]))


@lru_cache(maxsize=1)
def shipped() -> Calibration:
    """The calibration that comes with the package; its ``source`` says what it was measured on."""
    return Calibration.from_dict(json.loads(SHIPPED.read_text(encoding="utf-8")))
