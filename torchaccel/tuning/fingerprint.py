"""What a timing depends on besides the kernel: the device and the versions of what builds its code."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fingerprint:
    """The machine and the toolchain of a measurement; timings are used only where every field is the same.

    device: the name the maker gave the processor. units: CPU cores this process may use, or SMs of a GPU; the kernels'
    threads follow from them. capability: instruction set flags of a CPU ("avx2 avx512_bf16 ..."), compute capability of
    a GPU ("9.0"). torch, triton: versions of the packages, "" where there is none. compiler: first line of
    ``g++ --version`` for a CPU; "" for a GPU, whose compiler is triton's own. torchaccel: its version and the first
    digits of a hash over the kernels' sources, since a kernel that was changed has never been measured.
    """

    device: str
    units: int
    capability: str
    torch: str
    triton: str
    compiler: str
    torchaccel: str

    def to_dict(self) -> dict[str, str | int]:
        """The fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(found: object) -> Fingerprint:
        """The fingerprint whose ``to_dict()`` is ``found``; ``ValueError`` for anything else."""
        types = {"units": int}
        names = [field.name for field in fields(Fingerprint)]
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise ValueError(f"a fingerprint has the fields {', '.join(names)}; found {found!r}")
        for name in names:
            if type(found[name]) is not types.get(name, str):
                raise ValueError(f"field {name} of a fingerprint cannot be {found[name]!r}")
        return Fingerprint(**found)

    def differences(self, other: Fingerprint) -> list[str]:
        """A line per field in which ``other`` differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{name}: {mine[name]!r} here, {theirs[name]!r} there" for name in mine if mine[name] != theirs[name]]


@lru_cache(maxsize=8)
def fingerprint(device: torch.device) -> Fingerprint:
    """The fingerprint of ``device`` ("cpu", or a CUDA device, the current one without an index) in this process."""
    import torch

    versions = {"torch": torch.__version__, "triton": _version("triton"), "torchaccel": _torchaccel()}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        capability = f"{facts.major}.{facts.minor}"
        return Fingerprint(facts.name, facts.multi_processor_count, capability, **versions, compiler="")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Fingerprint(_processor(), cores, _instruction_sets(), **versions, compiler=_compiler())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> str:
    import torch

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    enabled = sorted(name for name, value in found.items() if value is True)
    return " ".join(enabled) or torch.backends.cpu.get_cpu_capability().lower()


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return ""
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0] if answer.stdout else ""


def _torchaccel() -> str:
    from torchaccel import kernels

    digest = hashlib.sha256()
    folder = Path(kernels.__path__[0])
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".jinja")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return f"{_version('torchaccel')}+{digest.hexdigest()[:12]}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
