"""What an installation provides: the backend, the command, the files, and an import without side effects."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {
    "torchaccel": ROOT / "torchaccel",
    "torchaccel.passes": ROOT / "passes",
    "torchaccel.kernels": ROOT / "kernels",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_dynamo_finds_the_backend_without_an_import() -> None:
    assert "torchaccel" in python("import torch._dynamo as d; print(d.list_backends())")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "transformers triton torch networkx sympy pydantic"
    found = python(f"import sys, torchaccel; print([m for m in {heavy.split()!r} if m in sys.modules])")
    assert found == "[]"


def test_the_backend_imports_neither_transformers_nor_triton() -> None:
    # torch itself imports triton where it is installed, so only what torch has not imported counts.
    code = (
        "import sys, torch, torch._dynamo, torch._inductor.compile_fx\n"
        "before = set(sys.modules)\n"
        "import torchaccel.backend\n"
        "print([m for m in ('transformers', 'triton') if m in set(sys.modules) - before])"
    )
    assert python(code) == "[]"


def test_importing_all_modules_touches_no_device() -> None:
    code = (
        "import pkgutil, importlib, torch, torchaccel\n"
        "skip = ('torchaccel.kernels.triton',)\n"
        "for m in pkgutil.walk_packages(torchaccel.__path__, 'torchaccel.'):\n"
        "    if not m.name.startswith(skip): importlib.import_module(m.name)\n"
        "print(torch.cuda.is_initialized())"
    )
    assert python(code) == "False"


def test_every_package_is_listed() -> None:
    found = {
        ".".join([name, *folder.relative_to(source).parts])
        for name, source in SOURCES.items()
        for folder in (source, *(path.parent for path in source.rglob("__init__.py")))
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel, built from a copy so that the checkout stays clean."""
    import shutil

    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("torchaccel", "passes", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*command, "--wheel-dir", "dist"], cwd=copy, check=True, capture_output=True, timeout=300)
    (built,) = (copy / "dist").glob("torchaccel-*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_every_source_file(wheel: set[str]) -> None:
    expected = {
        f"{name.replace('.', '/')}/{path.relative_to(source).as_posix()}"
        for name, source in SOURCES.items()
        for pattern in ("*.py", "*.h", "*.jinja", "py.typed")
        for path in source.rglob(pattern)
    }
    assert expected <= wheel


def test_the_wheel_holds_the_demo_model_and_the_licence(wheel: set[str]) -> None:
    files = ("config.json", "model.safetensors", "tokenizer.json", "excerpt.txt", "README.md")
    assert {f"torchaccel/demo_model/{name}" for name in files} <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_wheel_holds_no_tests_and_no_benchmarks(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"torchaccel"}


def test_the_versions_agree() -> None:
    import torchaccel

    assert torchaccel.__version__ == PROJECT["project"]["version"] == metadata.version("torchaccel")
