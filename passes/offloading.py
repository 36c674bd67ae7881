"""The option ``offload``: a folder for files that hold tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

Options = TypeVar("Options", bound=Any)


def folder(name: str | None) -> str | None:
    """The name of a folder that exists, or None; ``ValueError`` for any other."""
    if name is not None and not Path(name).is_dir():
        raise ValueError("offload names a folder for memory-mapped files, and there is none of this name")
    return name


def needs_restore(options: Options) -> Options:
    """``options``, whose ``offload`` is for what ``restore`` sets aside; ``ValueError`` where that is nothing."""
    if options.offload is not None and not options.restore:
        raise ValueError("offload is for the prompt that restore sets aside; ask for restore, too")
    return options


Offload = Annotated[str | None, AfterValidator(folder)]
