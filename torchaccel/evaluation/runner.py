"""How a variant runs a model: how it is built, which cache it reads, what its measurements mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .case import Case
from .generate import Sample, generate, sample
from .memory import transient_peak
from .models import ModelFacts, require_transformers, share_weights, text_config
from .results import Result

# Keys and values [B, H_kv, S, D] of every layer.
Content = Sequence[tuple[Tensor, Tensor]]


class Runner:
    """One way of running a model: plain eager, where a subclass says nothing else.

    ``cases`` are the benchmarks it takes part in; ``follows`` says that its settings depend on what others measured.
    """

    cases: ClassVar[tuple[str, ...]] = ("decode", "prefill", "generate", "evaluate")
    follows: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        """``options``: those of the variant, as the document shows them."""
        self.options = dict(options)

    def absent(self) -> str | None:
        """Why it cannot run here, and what to install; None when it can."""
        return None

    def settle(self, results: Sequence[Result], facts: ModelFacts, case: Case) -> None:
        """Take into ``options`` what depends on the measurements of the others (see ``follows``)."""

    def compiles(self, case: str) -> bool:
        """Whether it has graphs and a compile time in ``case``."""
        return False

    def build(self, model: Any, case: str) -> Any:
        """``model`` as it runs in ``case``: modules of its own, the parameter tensors of ``model``."""
        return share_weights(model)

    def new_cache(self, model: Any, capacity: int) -> Any | None:
        """The empty cache a prompt starts with, for ``capacity`` tokens; None for the one the model makes itself."""
        return None

    def filled_cache(self, model: Any, content: Content, capacity: int) -> Any:
        """A cache for ``capacity`` tokens that holds ``content``."""
        cache = self.new_cache(model, capacity)
        if cache is None:
            return require_transformers().DynamicCache(list(content), config=text_config(model))
        for layer, (keys, values) in enumerate(content):
            cache.update(keys, values, layer)
        return cache

    def kv_bytes(self, cache: Any) -> int:
        """Bytes really allocated for ``cache``."""
        import torchaccel

        return torchaccel.kv_bytes(cache)

    def generate(self, model: Any, prompt: Tensor, new_tokens: int) -> Sample:
        """One timed ``generate()`` of a model that ``build`` returned."""
        return sample(model, prompt, new_tokens, self.kv_bytes)

    def generate_peak(self, model: Any, prompt: Tensor, new_tokens: int, device: torch.device) -> int:
        """Largest number of bytes that ``generate()`` holds above the weights, its cache included."""
        return transient_peak(lambda: generate(model, prompt, new_tokens), device)

    def describe(self, model: Any, result: Result) -> None:
        """Add to ``result`` what the built model reports to have done."""

    @property
    def methods(self) -> Mapping[str, Mapping[str, Any]] | None:
        """Canonical options of the methods that change its floor; None when its traffic is not modelled."""
        return {}
