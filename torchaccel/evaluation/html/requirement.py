"""What the report needs beyond the rest of the package."""

from __future__ import annotations

import importlib.util


def require_matplotlib() -> None:
    """Raise ``RuntimeError`` when matplotlib is not installed; cheap, so commands ask before they measure."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "the HTML report was asked for, and matplotlib, which draws it, is not installed; "
            'run: pip install "torchaccel[report]"'
        )
