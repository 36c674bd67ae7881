"""A bundle: what a deployment was tuned and compiled to, in one archive, for machines that should not do it again.

The archive is a zip file of ``manifest.json`` (format, fingerprint, SHA-256 and size of every file), ``tuned.json``
(the records of the tuning cache), ``calibration/METHOD.safetensors`` (the calibration plans of methods), and under
``code/`` what can be executed: ``kernels/``, the binaries and sources that Inductor's code cache holds, and
``inductor.bin``, what ``torch.compiler.save_cache_artifacts()`` returns. The hashes show damage; they do not show who
made the bundle.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchaccel.errors import BundleError

from . import exchange
from .fingerprint import Fingerprint
from .record import Record

FORMAT = 1
MANIFEST = "manifest.json"
TUNED = "tuned.json"
CALIBRATION = "calibration/"
PLAN = ".safetensors"
ARTIFACTS = "code/inductor.bin"
KERNELS = "code/kernels/"
# Nothing else may be in a bundle: no absolute names, no "..", no folders, nothing that is looked up by another name.
_METHOD = re.compile(r"[a-z0-9_]+")
_KERNEL = re.compile(r"[a-z0-9]{2}/[a-z0-9]+(\.main)?\.(so|cpp)")
MAX_FILES = 10_000
MAX_BYTES = 2**30
MAX_MANIFEST_BYTES = 2**24


@dataclass(frozen=True)
class Bundle:
    """The verified contents of a bundle.

    fingerprint: the machine it was made on. toolchain: what compiled code depends on beyond that, by name. tuned,
    calibration: the portable part, records and the content of plans by method. kernels: file name within Inductor's
    cache folder -> content; artifacts: the bytes of ``torch.compiler.save_cache_artifacts()``; both are executed when
    they are loaded.
    """

    fingerprint: Fingerprint
    toolchain: Mapping[str, str]
    tuned: tuple[Record, ...]
    calibration: Mapping[str, bytes]
    kernels: Mapping[str, bytes]
    artifacts: bytes | None

    @property
    def has_code(self) -> bool:
        """Whether anything in it would be executed."""
        return bool(self.kernels) or self.artifacts is not None

    def toolchain_differences(self, toolchain: Mapping[str, str]) -> list[str]:
        """A line for each part of ``toolchain``, this machine's, that is not the one the code was compiled with."""
        return [
            f"{name}: {toolchain.get(name)!r} here, {self.toolchain.get(name)!r} there"
            for name in dict.fromkeys([*toolchain, *self.toolchain])
            if toolchain.get(name) != self.toolchain.get(name)
        ]

    def write(self, path: Path) -> None:
        """Write the archive, under a temporary name until it is complete."""
        files = {TUNED: exchange.to_text(self.tuned).encode()}
        files.update({CALIBRATION + method + PLAN: content for method, content in self.calibration.items()})
        if self.artifacts is not None:
            files[ARTIFACTS] = self.artifacts
        files.update({KERNELS + name: content for name, content in self.kernels.items()})
        for name in files:
            _check_name(name)
        manifest = {
            "format": FORMAT,
            "fingerprint": self.fingerprint.to_dict(),
            "toolchain": dict(self.toolchain),
            "files": {name: {"sha256": _sha256(content), "bytes": len(content)} for name, content in files.items()},
        }
        partial = path.with_name(path.name + ".partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST, json.dumps(manifest, indent=1))
            for name, content in files.items():
                archive.writestr(name, content)
        partial.replace(path)


def read_bundle(path: Path) -> Bundle:
    """Read and verify the bundle at ``path``; nothing is written or executed.

    Raises ``BundleError`` for a file that is no bundle, is damaged, or holds anything that a bundle does not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = _read_all(archive)
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise BundleError(f"{path} cannot be read as a bundle: {error}; create it again") from error
    except BundleError as error:
        raise BundleError(f"{path} is refused: {error}") from error
    try:
        return _from_files(files)
    except BundleError as error:
        raise BundleError(f"{path} is refused: {error}") from error


def _read_all(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Every file of the archive, if all of them are what a bundle may hold."""
    infos = archive.infolist()
    if len(infos) > MAX_FILES:
        raise BundleError(f"it holds {len(infos)} files, more than {MAX_FILES}")
    names: set[str] = set()
    total = 0
    for info in infos:
        _check_name(info.filename)
        if info.filename in names:
            raise BundleError(f"it holds {info.filename!r} twice")
        names.add(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise BundleError(f"{info.filename!r} is no regular file (a link, or something else)")
        limit = MAX_MANIFEST_BYTES if info.filename == MANIFEST else MAX_BYTES
        total += info.file_size
        if info.file_size > limit or total > MAX_BYTES:
            raise BundleError(
                f"{info.filename!r} unpacks to {info.file_size} bytes; {limit} and {MAX_BYTES} in all are allowed"
            )
    # Reading stops at the sizes that were just checked, whatever the compressed data would unpack to.
    return {info.filename: archive.read(info) for info in infos}


def _from_files(files: dict[str, bytes]) -> Bundle:
    if MANIFEST not in files:
        raise BundleError(f"it has no {MANIFEST}")
    manifest = _manifest(files.pop(MANIFEST))
    listed: dict[str, Any] = manifest["files"]
    if set(listed) != set(files):
        odd = ", ".join(sorted(set(listed) ^ set(files))[:5])
        raise BundleError(f"its manifest and its files are not the same: {odd}")
    for name, content in files.items():
        if listed[name] != {"sha256": _sha256(content), "bytes": len(content)}:
            raise BundleError(f"{name!r} is not what the manifest says (SHA-256 or size differ)")
    try:
        fingerprint = Fingerprint.from_dict(manifest["fingerprint"])
        tuned = exchange.from_text(files[TUNED].decode()) if TUNED in files else []
    except ValueError as error:
        raise BundleError(str(error)) from error
    kernels = {name.removeprefix(KERNELS): content for name, content in files.items() if name.startswith(KERNELS)}
    plans = {
        name.removeprefix(CALIBRATION).removesuffix(PLAN): content
        for name, content in files.items()
        if name.startswith(CALIBRATION)
    }
    return Bundle(fingerprint, manifest["toolchain"], tuple(tuned), plans, kernels, files.get(ARTIFACTS))


def _manifest(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise BundleError(f"its manifest is no JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise BundleError(f"its manifest has format {version!r}, this version reads format {FORMAT}")
    toolchain = found.get("toolchain")
    if not isinstance(found.get("files"), dict) or not isinstance(toolchain, dict):
        raise BundleError("its manifest names no files or no toolchain")
    if not all(isinstance(value, str) for value in toolchain.values()):
        raise BundleError("the toolchain of its manifest is not a list of texts")
    return found


def _check_name(name: str) -> None:
    plain = name in (MANIFEST, TUNED, ARTIFACTS)
    kernel = name.startswith(KERNELS) and _KERNEL.fullmatch(name.removeprefix(KERNELS))
    method = name.removeprefix(CALIBRATION).removesuffix(PLAN)
    if not plain and not kernel and not (name == CALIBRATION + method + PLAN and _METHOD.fullmatch(method)):
        raise BundleError(f"{name!r} is no name of a file in a bundle")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def merged(records: Iterable[Record], others: Iterable[Record]) -> tuple[Record, ...]:
    """Both, without repetitions; of the same key, candidate and kind the newer."""
    newest: dict[tuple[object, ...], Record] = {}
    for record in sorted((*records, *others), key=lambda record: record.at):
        newest[record.key, record.candidate, type(record.outcome)] = record
    return tuple(newest.values())
