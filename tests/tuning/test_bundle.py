"""Bundles: what goes in comes out, and nothing that was tampered with is used."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tuning.support import MACHINE, elsewhere, timing
from torchaccel.calibration.identity import ModelIdentity
from torchaccel.calibration.plan import CalibrationPlan
from torchaccel.errors import BundleError, CacheWarning
from torchaccel.tuning import bundle as bundles
from torchaccel.tuning import code, deployment
from torchaccel.tuning.bundle import Bundle, merged, read_bundle
from torchaccel.tuning.deployment import Deployment
from torchaccel.tuning.fingerprint import fingerprint

CPU = torch.device("cpu")
KERNEL = "ab/cabcdef.main.so"
PLAN = CalibrationPlan("cskv", {"rank": 2}, ModelIdentity("Model", (), ()), {"x": torch.ones(3)}, "0.1.0")
PLAN_FILE = f"{bundles.CALIBRATION}cskv{bundles.PLAN}"
Files = dict[str, bytes]


@pytest.fixture
def whole() -> Bundle:
    return Bundle(
        MACHINE, {"python": "3.11"}, (timing(),), {"cskv": PLAN.to_bytes()}, {KERNEL: b"binary"}, b"artifacts"
    )


@pytest.fixture
def path(tmp_path: Path, whole: Bundle) -> Path:
    whole.write(tmp_path / "model.bundle")
    return tmp_path / "model.bundle"


def test_a_bundle_comes_back_as_it_was(path: Path, whole: Bundle) -> None:
    assert read_bundle(path) == whole
    assert whole.has_code and not list(path.parent.glob("*.partial"))


def test_a_bundle_without_code_or_plan(tmp_path: Path, whole: Bundle) -> None:
    portable = replace(whole, calibration={}, kernels={}, artifacts=None)
    portable.write(tmp_path / "portable")
    assert read_bundle(tmp_path / "portable") == portable and not portable.has_code


def contents(path: Path) -> Files:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, files: Files, *, listed: bool = False) -> None:
    """Replace an archive's files; ``listed`` makes the manifest agree with them, as an attacker would."""
    if listed:
        manifest = json.loads(files[bundles.MANIFEST])
        manifest["files"] = {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
            if name != bundles.MANIFEST
        }
        files = {**files, bundles.MANIFEST: json.dumps(manifest).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_rewriting_as_it_was_is_accepted(path: Path, whole: Bundle) -> None:
    # The attacks below are refused for what they change, not for how they are made.
    rewritten(path, contents(path), listed=True)
    assert read_bundle(path) == whole


@pytest.mark.parametrize("name", [bundles.TUNED, PLAN_FILE, bundles.ARTIFACTS, bundles.KERNELS + KERNEL])
def test_a_changed_file_is_named(path: Path, name: str) -> None:
    files = contents(path)
    rewritten(path, {**files, name: bytes([files[name][0] ^ 1]) + files[name][1:]})
    with pytest.raises(BundleError, match="is not what the manifest says"):
        read_bundle(path)


def test_a_missing_and_an_unlisted_file_are_named(path: Path) -> None:
    files = contents(path)
    rewritten(path, {name: content for name, content in files.items() if name != bundles.TUNED})
    with pytest.raises(BundleError, match=bundles.TUNED):
        read_bundle(path)
    rewritten(path, {**files, f"{bundles.KERNELS}cd/extra.so": b"more"})
    with pytest.raises(BundleError, match="extra"):
        read_bundle(path)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.so",
        "/etc/passwd",
        "code/kernels/../../evil.so",
        "code/kernels/ab/../cevil.so",
        "code/kernels//etc/cron.so",
        "code/kernels/ab/evil.py",
        "code/kernels/ab/cevil.so/",
        "code/kernels/ab\\cevil.so",
        "C:\\evil.so",
        "code/kernels/ab/cevil.so\n",
        "code/kernels/AB/cevil.so",
        "notes.txt",
    ],
)
def test_other_names_are_refused_even_when_the_manifest_lists_them(path: Path, name: str) -> None:
    rewritten(path, {**contents(path), name: b"evil"}, listed=True)
    with pytest.raises(BundleError, match="no name of a file in a bundle"):
        read_bundle(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
def test_links_and_devices_are_refused(path: Path, kind: int) -> None:
    files = contents(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            if name.endswith(KERNEL):
                info.external_attr = (kind | 0o777) << 16
            archive.writestr(info, content)
    with pytest.raises(BundleError, match="no regular file"):
        read_bundle(path)


def test_a_name_that_stands_twice_is_refused(path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(bundles.KERNELS + KERNEL, b"binary")
    with pytest.raises(BundleError, match="twice"):
        read_bundle(path)


def test_a_file_that_unpacks_to_too_much_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_BYTES", 5000)
    files = contents(path)
    files[bundles.ARTIFACTS] = bytes(6000)
    manifest = json.loads(files[bundles.MANIFEST])
    manifest["files"][bundles.ARTIFACTS] = {"sha256": hashlib.sha256(bytes(6000)).hexdigest(), "bytes": 6000}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, bundles.MANIFEST: json.dumps(manifest).encode()}.items():
            archive.writestr(name, content)
    with pytest.raises(BundleError, match="unpacks to 6000 bytes"):
        read_bundle(path)


def test_too_many_files_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_FILES", 3)
    with pytest.raises(BundleError, match="more than 3"):
        read_bundle(path)


def manifest_with(change: Callable[[dict[str, object]], object]) -> Callable[[Files], Files]:
    def changed(files: Files) -> Files:
        manifest = json.loads(files[bundles.MANIFEST])
        change(manifest)
        return {**files, bundles.MANIFEST: json.dumps(manifest).encode()}

    return changed


@pytest.mark.parametrize(
    "change",
    [
        manifest_with(lambda manifest: manifest.update(format=99)),
        manifest_with(lambda manifest: manifest.update(files=None)),
        manifest_with(lambda manifest: manifest.update(toolchain={"python": 3})),
        manifest_with(lambda manifest: manifest.update(fingerprint={"device": "x"})),
        lambda files: {**files, bundles.MANIFEST: b"[]"},
        lambda files: {**files, bundles.MANIFEST: b"not json"},
        lambda files: {name: content for name, content in files.items() if name != bundles.MANIFEST},
    ],
)
def test_a_manifest_that_is_none_is_refused(path: Path, change: Callable[[Files], Files]) -> None:
    rewritten(path, change(contents(path)))
    with pytest.raises(BundleError):
        read_bundle(path)


def test_damaged_bytes_never_raise_anything_else(path: Path) -> None:
    import random

    whole, numbers, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(3):
            content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        path.write_bytes(content[: numbers.randrange(len(content)) if numbers.random() < 0.2 else None])
        try:
            read_bundle(path)
        except BundleError:
            refused += 1
    assert refused > 100


def test_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="absent"):
        read_bundle(tmp_path / "absent")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, whole: Bundle) -> list[bytes | None]:
    """What would have been executed; the toolchain of this machine is that of the bundle."""
    found: list[bytes | None] = []
    monkeypatch.setattr(deployment.code, "install", lambda kernels, artifacts: found.append(artifacts))
    monkeypatch.setattr(deployment.code, "toolchain", lambda: dict(whole.toolchain))
    return found


def written(path: Path, bundle: Bundle) -> Path:
    bundle.write(path)
    return path


def test_code_runs_on_the_same_machine_with_trust(tmp_path: Path, whole: Bundle, installed: list[bytes | None]) -> None:
    own = written(tmp_path / "own", replace(whole, fingerprint=fingerprint(CPU)))
    known = Deployment()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        brought = known.bring(own, True, CPU)
        known.bring(own, True, CPU)
    assert brought.refused is None and installed == [b"artifacts"]
    assert brought.records == (timing(),) and brought.plans == (PLAN,)


def test_without_trust_no_code_runs_and_the_rest_is_used(
    tmp_path: Path, whole: Bundle, installed: list[bytes | None]
) -> None:
    own = written(tmp_path / "own", replace(whole, fingerprint=fingerprint(CPU)))
    with pytest.warns(CacheWarning, match="trust"):
        brought = Deployment().bring(own, False, CPU)
    assert brought.refused and not installed
    assert brought.records == (timing(),) and brought.plans == (PLAN,)


def test_code_of_another_device_is_refused_field_by_field(path: Path, installed: list[bytes | None]) -> None:
    with pytest.warns(CacheWarning) as caught:
        brought = Deployment().bring(path, True, CPU)
    message = str(caught[0].message)
    assert "device: " in message and "'Some CPU' there" in message and "capability: " in message
    assert not installed and brought.records == (timing(),)


def test_code_of_another_toolchain_is_refused(tmp_path: Path, whole: Bundle, installed: list[bytes | None]) -> None:
    own = replace(whole, fingerprint=fingerprint(CPU), toolchain={"python": "2.7"})
    with pytest.warns(CacheWarning, match=r"python: '3.11' here, '2.7' there"):
        Deployment().bring(written(tmp_path / "own", own), True, CPU)
    assert not installed


def test_nothing_of_a_damaged_bundle_is_used(path: Path, installed: list[bytes | None]) -> None:
    rewritten(path, {**contents(path), bundles.ARTIFACTS: b"other"})
    with pytest.warns(CacheWarning, match="Nothing of it is used"):
        brought = Deployment().bring(path, True, CPU)
    assert brought.records == () and brought.plans == () and not installed


def test_strict_raises_instead(path: Path) -> None:
    with pytest.raises(BundleError, match="another device"):
        Deployment().bring(path, True, CPU, strict=True)


def test_installing_writes_what_is_missing_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "cold.so").write_bytes(b"this machine's")
    code.install({"ab/cold.so": b"the bundle's", "cd/cnew.so": b"new"}, None)
    assert (tmp_path / "ab" / "cold.so").read_bytes() == b"this machine's"
    assert (tmp_path / "cd" / "cnew.so").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["cnew.so", "cold.so"]


def test_merging_keeps_the_newer() -> None:
    old, new, other = timing("cpp", 1.0, at=1.0), timing("cpp", 2.0, at=2.0), timing("cpp", 3.0, elsewhere())
    assert set(merged([new], [old, other])) == {new, other}


def test_the_archive_is_an_ordinary_zip(path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert archive.testzip() is None and archive.namelist()[0] == bundles.MANIFEST
