"""The results document: one record per variant, with null for whatever does not apply."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .timing import Spread


@dataclass
class Fidelity:
    """How far a variant is from the truth; None where it was not measured.

    Errors are absolute differences of logits to the float32 eager model, ``kl`` is KL(float32 || variant) in nats per
    token, ``top1`` the share of tokens whose most likely successor is the same, ``greedy_prefix`` the number of leading
    tokens equal to eager's, ``recall`` the score of each task.
    """

    max_abs_err_vs_fp32: float | None = None
    eager_max_abs_err_vs_fp32: float | None = None
    kl: float | None = None
    top1: float | None = None
    greedy_prefix: int | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_ci95: list[float] | None = None
    bits_per_byte: float | None = None
    recall: dict[str, float] | None = None


@dataclass
class Result:
    """What was measured of one variant; times in milliseconds, sizes in bytes."""

    variant: str
    options: dict[str, Any]
    effective: dict[str, Any] | None = None
    status: Literal["ok", "absent", "declined", "failed"] = "ok"
    reason: str | None = None
    ms: Spread | None = None
    ttft_ms: Spread | None = None
    tpot_ms: Spread | None = None
    speedup: dict[str, float] | None = None
    bound_ms: float | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    graphs: int | None = None
    recompiles: int | None = None
    compile_s: dict[str, float | None] = field(default_factory=lambda: {"cold": None, "warm": None})
    predicted_ms: float | None = None
    fidelity: Fidelity = field(default_factory=Fidelity)
    density: float | None = None
    details: dict[str, Any] | None = None

    @property
    def roofline_fraction(self) -> float | None:
        """Floor over measured median, of a token where a whole generation was timed: 1 is the limit of the machine."""
        timed = self.ms or self.tpot_ms
        return None if self.bound_ms is None or timed is None else self.bound_ms / timed.median

    def fail(self, error: Exception) -> None:
        """Record that this variant could not run, and why, in one line."""
        self.status = "failed"
        lines = str(error).strip().splitlines()
        self.reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

    def to_dict(self) -> dict[str, Any]:
        """The record in the document's words."""
        spreads = {name: getattr(self, name) for name in ("ms", "ttft_ms", "tpot_ms")}
        times = {name: spread and spread.to_dict() for name, spread in spreads.items()}
        return asdict(self) | times | {"roofline_fraction": self.roofline_fraction}


def document(
    *,
    command: list[str],
    versions: Mapping[str, str | None],
    machine: Mapping[str, Any],
    model: Mapping[str, Any],
    case: Mapping[str, Any],
    results: Iterable[Result],
) -> dict[str, Any]:
    """The whole document, ready for ``json.dumps``."""
    return {
        "command": command,
        "versions": dict(versions),
        "machine": dict(machine),
        "model": dict(model),
        "case": dict(case),
        "results": [result.to_dict() for result in results],
    }


def write_document(found: Mapping[str, Any], path: Path) -> None:
    """Write a document as JSON; whoever reads ``path`` meanwhile, or after an interruption, finds a whole one."""
    text = json.dumps(found, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def exit_code(results: Iterable[Mapping[str, Any]]) -> int:
    """0 for a complete document, 1 when a torchaccel variant failed; ``results`` as they stand in the document."""
    failed = any(r["status"] == "failed" and r["variant"].startswith("torchaccel") for r in results)
    return int(failed)
