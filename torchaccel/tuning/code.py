"""The executable part of a bundle: recording what a process compiles, and putting it where compilers look."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchaccel.errors import BundleError

# What is known when the fingerprint is the same need not be found out: that code for these instruction sets runs here.
# (Where the bundle was made, compiling and running the model showed it.)
# Precompiled headers lie outside of Inductor's cache folder and would be compiled again for kernels that are there
# already. Both are part of Inductor's keys, so they hold when a bundle is made and when it is used.
SETTINGS: Mapping[str, Any] = {"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}


@contextmanager
def settings() -> Iterator[None]:
    """Compile as bundles are compiled."""
    from torch._inductor import config

    with config.patch(dict(SETTINGS)):
        yield


def toolchain() -> dict[str, str]:
    """What binaries depend on beyond the fingerprint: Python, the system, and the compiler's command line.

    The flags of the instruction set are left out: they follow from the fingerprint, and finding them out compiles.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    python = ".".join(platform.python_version_tuple()[:2])
    found = {"python": python, "system": f"{platform.system()} {platform.machine()}"}
    try:
        options = CppTorchDeviceOptions(
            vec_isa=invalid_vec_isa, device_type="cpu", include_pytorch=False, shared=True, compile_only=True
        )
        command = CppBuilder(name="o", sources="i", BuildOption=options).get_command_line()
    except Exception as error:  # no compiler: then nothing that needs one can be in the code cache
        command = type(error).__name__
    return found | {"compile command": hashlib.sha256(command.encode()).hexdigest()[:16]}


def record(run: Callable[[], object]) -> tuple[dict[str, bytes], bytes | None]:
    """Do ``run`` with an empty cache folder and return what it compiled: kernel files by name, Inductor's artifacts.

    For a process that has compiled nothing yet; what is compiled already is in no folder any more. Raises
    ``BundleError`` when nothing was compiled.
    """
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="torchaccel-bundle-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            with settings():
                run()
            saved = torch.compiler.save_cache_artifacts()
            kernels = _kernels(Path(folder))
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    if not kernels and saved is None:
        raise BundleError("nothing was compiled: a bundle is made in a process that has not compiled the model before")
    return kernels, None if saved is None else saved[0]


def install(kernels: Mapping[str, bytes], artifacts: bytes | None) -> None:
    """Put kernels into Inductor's cache folder, beside what is there, and load its artifacts, which executes code.

    Raises ``OSError`` when the folder cannot be written.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    for name, content in kernels.items():
        target = folder / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        # Complete or absent, whoever else is at it.
        handle, partial = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    if artifacts is not None:
        torch.compiler.load_cache_artifacts(artifacts)


def _kernels(folder: Path) -> dict[str, bytes]:
    binaries = sorted(folder.glob("??/*.so"))
    files = [*binaries, *(source for path in binaries if (source := path.with_suffix(".cpp")).is_file())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
