"""Models and captured graphs shared by the tests of this folder: each is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.graph.capture import Captured, capture_encoder, capture_phase
from tests.models.families import ENCODERS, build


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    """Tiny tensors: a second thread only costs time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_of() -> Callable[..., nn.Module]:
    """``model_of(name, attn_implementation)``, made once each."""
    made: dict[Any, nn.Module] = {}

    def get(name: str, attn_implementation: str | None = None) -> nn.Module:
        key = (name, attn_implementation)
        if key not in made:
            made[key] = build(name, attn_implementation=attn_implementation)
        return made[key]

    return get


@pytest.fixture(scope="session")
def captured(model_of: Callable[..., nn.Module]) -> Callable[..., Captured]:
    """``captured(name, phase, attn_implementation, **call)``, captured once each; phase "encoder" for encoders."""
    made: dict[Any, Captured] = {}

    def get(name: str, phase: str, attn_implementation: str | None = None, **call: Any) -> Captured:
        key = (name, phase, attn_implementation, tuple(sorted(call.items())))
        if key not in made:
            model = model_of(name, attn_implementation)
            made[key] = capture_encoder(model, **call) if name in ENCODERS else capture_phase(model, phase, **call)
        return made[key]

    return get
