"""One greedy ``model.generate`` call: its tokens, its times and the bytes of its cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost.probe import timed
from .models import text_config


class TokenClock:
    """A streamer for ``generate`` that notes when tokens arrive; the prompt arrives first."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._arrivals: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with every new token, already on the CPU."""
        self._arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` at the end."""

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from the call to the first new token."""
        return (self._arrivals[1] - self._started) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Mean milliseconds of each token after the first."""
        return (self._arrivals[-1] - self._arrivals[1]) * 1e3 / max(1, len(self._arrivals) - 2)


@dataclass(frozen=True)
class Sample:
    """One call: new tokens ``[B, n]``, milliseconds in all, to the first and per further token, bytes of the cache."""

    tokens: Tensor
    ms: float
    ttft_ms: float
    tpot_ms: float
    kv_bytes: int


@torch.no_grad()
def generate(
    model: Any, prompt: Tensor, new_tokens: int, clock: TokenClock | None = None, processors: Sequence[Any] = ()
) -> Any:
    """Exactly ``new_tokens`` greedy tokens after ``prompt``; the output has ``sequences`` and ``past_key_values``.

    ``processors`` see the logits of every step and may change them.
    """
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        # A token that does not exist: the end token is then a token like any other, and its logit is left alone.
        eos_token_id=text_config(model).vocab_size,
        do_sample=False,
        streamer=clock,
        logits_processor=list(processors),
        return_dict_in_generate=True,
    )


def sample(model: Any, prompt: Tensor, new_tokens: int, count_bytes: Callable[[Any], int]) -> Sample:
    """Time one ``generate`` of ``model``; ``count_bytes`` tells what its cache takes at the end."""
    found: list[Any] = []
    clock = TokenClock()
    spent = timed(lambda: found.append(generate(model, prompt, new_tokens, clock)), prompt.device)
    tokens = found[0].sequences[:, prompt.shape[1] :]
    return Sample(tokens, spent, clock.ttft_ms, clock.tpot_ms, count_bytes(found[0].past_key_values))
