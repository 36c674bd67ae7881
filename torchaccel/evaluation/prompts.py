"""Prompts of an exact number of tokens, from the excerpt that comes with the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .models import DEMO_MODEL, LoadedModel, text_config


def excerpt() -> str:
    """The first chapters of Treasure Island (1883, public domain), about 20,000 characters."""
    return (DEMO_MODEL / "excerpt.txt").read_text(encoding="utf-8")


def excerpt_tokens(tokenizer: Any, count: int) -> list[int]:
    """``count`` tokens of the excerpt, from its beginning again when it is too short."""
    tokens = tokenizer.encode(excerpt(), add_special_tokens=False)
    return (tokens * (count // len(tokens) + 1))[:count]


def prompt_tokens(loaded: LoadedModel, batch: int, count: int, device: torch.device) -> Tensor:
    """Token ids ``[B, count]``: the excerpt where there is a tokenizer, else seeded random ids."""
    if loaded.tokenizer is not None:
        return torch.tensor([excerpt_tokens(loaded.tokenizer, count)] * batch, device=device)
    generator = torch.Generator().manual_seed(1)
    vocabulary = text_config(loaded.model).vocab_size
    return torch.randint(2, vocabulary, (batch, count), generator=generator).to(device)
