"""A preallocated cache and compiled decode steps, as transformers recommends it."""

from __future__ import annotations

from typing import Any

from ..models import require_transformers, text_config
from ..runner import Runner


class Static(Runner):
    """``StaticCache`` with transformers' own ``CompileConfig``: one graph of fixed shapes serves every decode step.

    transformers compiles decode steps only and runs the prompt eagerly, since every length would ask for a graph of its
    own. This baseline does the same, so its prefill is an eager one into the preallocated cache.
    """

    def compiles(self, case: str) -> bool:
        """All but the prompt."""
        return case != "prefill"

    def build(self, model: Any, case: str) -> Any:
        """Compile what transformers compiles in ``case``: the decode step, the steps within generate, no prompt."""
        copy = super().build(model, case)
        config = require_transformers().generation.CompileConfig()
        if case == "decode":
            copy.compile(**config.to_dict())
        elif case != "prefill":
            # Without this switch transformers compiles on GPUs only.
            config._compile_all_devices = True
            copy.generation_config.update(cache_implementation="static", compile_config=config)
        return copy

    def new_cache(self, model: Any, capacity: int) -> Any:
        """A StaticCache for ``capacity`` tokens."""
        return require_transformers().StaticCache(text_config(model), max_cache_len=capacity)
