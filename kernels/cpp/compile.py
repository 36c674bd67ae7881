"""Compile generated C++ into callables, through Inductor's on-disk code cache."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import torch

Entry = Callable[..., None]


@lru_cache(maxsize=1)
def templates() -> jinja2.Environment:
    """The C++ templates of this package; an undefined symbol is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **symbols: Any) -> str:
    """The C++ source of ``template``, in which every symbol of ``symbols`` is replaced; equal input, equal text."""
    return templates().get_template(template).render(**symbols)


@lru_cache(maxsize=1)
def missing_toolchain() -> str | None:
    """Why no kernel can be compiled on this machine, in one line for the user; None when a C++ compiler was found."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the C++ kernels are written for x86-64; this machine is {platform.machine()}"
    if platform.system() != "Linux":
        return f"the C++ kernels are built with g++ on Linux; this system is {platform.system()}"
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler was found: install g++, or set CXX to its path"
    if not pick_vec_isa():
        return "the C++ compiler builds no AVX2 or AVX-512 code that runs on this machine"
    return None


@lru_cache(maxsize=4096)
def compile_source(source: str) -> Entry:
    """Build ``source`` and return its ``call``: a function of as many integers as the source's ``Args`` has fields.

    The binary is kept in Inductor's cache directory (TORCHINDUCTOR_CACHE_DIR), under a file lock, so processes may
    compile the same source at once. Raises ``torch._inductor.exc.CppCompileError`` with the compiler's message.
    """
    from torch._inductor import config

    # The flags contain -march=native, so a cache directory shared by different machines must tell them apart.
    stamped = f"{source}\n// Built for: {_machine()}\n"
    with config.patch(cpp_cache_precompile_headers=shutil.which("openssl") is not None):  # Inductor hashes by it
        module = _code_cache().load_async(stamped)()
    return module.call


@lru_cache(maxsize=1)
def _code_cache() -> Any:
    """Inductor's cache of compiled code, with ``prelude.h`` compiled ahead."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    class Cache(CppPythonBindingsCodeCache):
        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str:
            return str(Path(__file__).with_name("prelude.h"))

    return Cache


@lru_cache(maxsize=1)
def _machine() -> str:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    enabled = sorted(name for name, value in capabilities.items() if value is True)
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {' '.join(enabled)}"
