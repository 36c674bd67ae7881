"""transformers' quantised cache: integers of a few bits, or 8-bit floats, read back in full for every token."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ..allocated import tensor_bytes
from ..models import require_transformers, text_config
from ..runner import Runner

# Backend -> settings, where transformers' defaults do not serve it.
BACKENDS: dict[str, dict[str, Any]] = {"quanto": {}, "hqq": {"axis_key": 1, "axis_value": 1}, "fp8": {}}
# Backend -> the package it needs and the module that package brings.
PACKAGES = {"quanto": ("optimum-quanto", "optimum.quanto"), "hqq": ("hqq", "hqq")}


class HFQuantized(Runner):
    """``QuantizedCache`` of transformers, eager; ``options["backend"]`` names its quantiser (quanto: 4 bits)."""

    def absent(self) -> str | None:
        """The package its backend needs, when that is missing."""
        package, module = PACKAGES.get(self._backend, (None, ""))
        if package is None or _importable(module):
            return None
        return f"{package} is not installed: pip install {package}; hf_quantized:fp8 needs no package"

    def build(self, model: Any, case: str) -> Any:
        """A copy whose ``generate()`` makes a quantised cache."""
        copy = super().build(model, case)
        settings = {"backend": self._backend, **BACKENDS[self._backend]}
        copy.generation_config.update(cache_implementation="quantized", cache_config=settings)
        return copy

    def new_cache(self, model: Any, capacity: int) -> Any:
        """An empty QuantizedCache; it grows, so ``capacity`` does not matter."""
        return require_transformers().QuantizedCache(self._backend, text_config(model), **BACKENDS[self._backend])

    def kv_bytes(self, cache: Any) -> int:
        """Codes, scales, zero points, and the recent tokens that are kept in full precision."""
        return tensor_bytes(cache.layers)

    @property
    def methods(self) -> None:
        """Not modelled: every step reads the codes and writes all tokens back in full."""
        return None

    @property
    def _backend(self) -> str:
        return str(self.options["backend"])


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False
