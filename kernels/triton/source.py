"""From template to importable module: rendering, and the cache directory that holds generated source files."""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
import textwrap
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import platformdirs

from ..spec import AttentionSpec

TYPES = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}


def cache_dir() -> Path:
    """Folder of generated sources: ``$TORCHACCEL_CACHE_DIR/triton``, or the user's cache directory."""
    root = os.environ.get("TORCHACCEL_CACHE_DIR") or platformdirs.user_cache_dir("torchaccel")
    return Path(root) / "triton"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["nested"] = _nested
    return environment


def _nested(text: str, width: int) -> str:
    """The lines of a macro within a block indented by ``width`` columns."""
    return textwrap.indent(text.strip("\n"), " " * width)


def render(template: str, spec: AttentionSpec, **values: Any) -> str:
    """Source of ``template`` for ``spec``; the same arguments give the same text on every machine."""
    return render_text(
        template,
        spec.head_dim,
        key=spec.key(),
        G=spec.group,
        dtype=TYPES[spec.dtype],
        scale=spec.scale,
        softcap=spec.softcap,
        causal=spec.causal,
        window=spec.window,
        sinks=spec.sinks if spec.window is not None else 0,
        mask=spec.mask,
        index=spec.index,
        index_block=spec.index_block,
        # A log-sum-exp that only the mass kernel reads is stored as well.
        lse=spec.lse or spec.mass,
        natural=spec.mask == "additive",
        rotary=spec.rotary,
        rotary_dim=spec.rotary_dim,
        **values,
    )


def render_text(template: str, head_dim: int = 1, **values: Any) -> str:
    """Source of ``template`` for what it names, such as a head dimension."""
    log2e, ln2 = math.log2(math.e), math.log(2)
    sizes = {"D": head_dim, "DP": padded(head_dim)}
    text = _environment().get_template(template).render(**sizes, log2e=log2e, ln2=ln2, **values)
    text = re.sub(r"\n+@triton", "\n\n\n@triton", text)
    # Where a template has nothing to say, it leaves no more than a blank line.
    return re.sub(r"\n{3,}(?= )", "\n\n", text).rstrip("\n") + "\n"


def scalars(names: list[str], tensors: set[str]) -> str:
    """The parameters that are no tensors, quoted: numbers that a kernel is not to be specialised for."""
    return ", ".join(f'"{name}"' for name in names if name not in tensors)


def padded(size: int) -> int:
    """The power of two, at least 16 (the smallest matrix product of the tensor cores), that holds ``size``."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The power of two that holds ``size``, at least 1."""
    return 1 << (size - 1).bit_length()


def write(source: str, stem: str) -> Path:
    """Store ``source`` under a name made of ``stem`` and its hash; safe between processes.

    Raises RuntimeError when the cache directory cannot be written.
    """
    path = cache_dir() / f"{stem}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    try:
        if path.exists() and path.read_text() == source:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.replace(temporary, path)
    except OSError as error:
        raise RuntimeError(
            f"generated Triton kernels are stored in {path.parent}, which cannot be written ({error}); "
            "set TORCHACCEL_CACHE_DIR to a folder that can"
        ) from error
    return path


@lru_cache(maxsize=1024)
def load(source: str, stem: str) -> ModuleType:
    """Import ``source`` from its file in the cache directory (Triton reads the text of its kernels from files)."""
    path = write(source, stem)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    # The text given is what runs, whatever became of the file meanwhile.
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
