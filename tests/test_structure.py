"""The shape of the project: imports point one way, and every method has all its parts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchaccel.methods import list_methods

ROOT = Path(__file__).parent.parent
SOURCES = {
    "torchaccel.passes": ROOT / "passes",
    "torchaccel.kernels": ROOT / "kernels",
    "torchaccel": ROOT / "torchaccel",
}

# A layer may import itself and what is listed here. All errors are in one file, a leaf that every layer may use.
ALLOWED: dict[str, tuple[str, ...]] = {
    "torchaccel.kernels": ("torchaccel.errors",),
    "torchaccel.graph": ("torchaccel.errors",),
    "torchaccel.errors": (),
    "torchaccel.runtime": ("torchaccel.kernels", "torchaccel.errors"),
    "torchaccel.cost": ("torchaccel.kernels", "torchaccel.errors"),
    "torchaccel.tuning": ("torchaccel.calibration.plan", "torchaccel.cost", "torchaccel.kernels", "torchaccel.errors"),
    "torchaccel.calibration.identity": ("torchaccel.errors",),
    "torchaccel.calibration.plan": ("torchaccel.calibration.identity", "torchaccel.errors"),
    "torchaccel.calibration.calibrator": ("torchaccel.calibration.identity",),
    "torchaccel.calibration.head_gates": ("torchaccel.calibration.calibrator", "torchaccel.errors"),
    "torchaccel.passes": (
        "torchaccel.calibration.head_gates",
        "torchaccel.calibration.identity",
        "torchaccel.calibration.plan",
        "torchaccel.calibration.calibrator",
        "torchaccel.graph",
        "torchaccel.runtime",
        "torchaccel.cost",
        "torchaccel.kernels",
        "torchaccel.errors",
    ),
}
TOP = ("torchaccel.cli", "torchaccel.evaluation")


def modules() -> dict[str, Path]:
    """Every module of the project by its import name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([package, *parts])] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[str]:
    """Modules of the project that a module imports, anywhere in it, except for type checking alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for guard in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(guard.test) == "TYPE_CHECKING":
            guard.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if in_project(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if in_project(base):
                # "from package import module" imports the module, "from module import name" the module it is in.
                yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)


def in_project(name: str) -> bool:
    return name == "torchaccel" or name.startswith("torchaccel.")


def within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def test_the_walk_sees_the_project() -> None:
    assert {"torchaccel.backend", "torchaccel.kernels.spec", "torchaccel.passes.manager"} <= set(MODULES)
    roofline = "torchaccel.evaluation.roofline"
    assert "torchaccel.kernels.spec" in set(imports(roofline, MODULES[roofline]))


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_point_one_way(layer: str) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        if within(name, layer)
        for target in imports(name, path)
        if not any(within(target, allowed) for allowed in (layer, *ALLOWED[layer]))
    ]
    assert not wrong


def test_nothing_imports_the_command_line_or_the_evaluation() -> None:
    # But for the package itself, which offers torchaccel.evaluate and imports it on first use.
    wrong = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        if name != "torchaccel" and not any(within(name, top) for top in TOP)
        for target in imports(name, path)
        if any(within(target, top) for top in TOP)
    ]
    assert not wrong


def test_the_backend_uses_the_passes() -> None:
    targets = set(imports("torchaccel.backend", MODULES["torchaccel.backend"]))
    assert any(within(target, "torchaccel.passes") for target in targets)


METHODS = [(row["family"], row["method"]) for row in list_methods()]


def test_every_family_has_a_method() -> None:
    families = {"layer_skipping", "token_pruning", "kv_compression", "sparse_attention"}
    assert {family for family, _ in METHODS} == families


@pytest.mark.parametrize(("family", "method"), METHODS)
def test_a_method_is_one_file_with_an_options_class(family: str, method: str) -> None:
    path = ROOT / "passes" / family / f"{method}.py"
    classes = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
    assert [name for name in classes if name.endswith("Options")], f"{path} defines no ...Options class"


@pytest.mark.parametrize(("family", "method"), METHODS)
def test_a_method_has_a_test_file(family: str, method: str) -> None:
    assert (ROOT / "tests" / "passes" / family / f"test_{method}.py").is_file()


@pytest.mark.parametrize(("family", "method"), METHODS)
def test_a_method_has_a_row_in_the_docs_that_names_its_options(family: str, method: str) -> None:
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{family}` | `{method}` |")]
    assert len(rows) == 1
    schema = next(row for row in list_methods(family) if row["method"] == method)["options_schema"]
    missing = [name for name in schema.get("properties", {}) if f"`{name}`" not in rows[0]]
    assert not missing


def test_documentation_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
