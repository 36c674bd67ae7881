"""Ragged caches in Triton: the cases that the other kernels are checked with."""

from __future__ import annotations

import torch
from torch import Tensor
from torchaccel.kernels import ragged
from torchaccel.kernels.triton.decode_attention import decode_attention

from tests.kernels.ragged_cases import RAGGED_CASES, RaggedCase

from .decode_cases import TOLERANCE, difference

__all__ = ["RAGGED_CASES", "run_ragged_case"]


def run_ragged_case(case: RaggedCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against attention head by head: None when it agrees, else what differs."""
    given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in case.inputs.items()}
    lens = given.pop("lens")
    moved = {name: None if x is None else x.to(device) for name, x in given.items()}
    got = ragged.attend(decode_attention(case.spec), lens=lens, **moved)
    return difference("out", got.cpu().float(), case.expected(), TOLERANCE[case.dtype])
