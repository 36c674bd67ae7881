"""Digests that tell whether two runs worked on the same texts and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

SAMPLES = 256


def text_digest(texts: Sequence[str]) -> str:
    """SHA-256 of ``texts``, in order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names of all parameters and of up to ``SAMPLES`` elements of each, evenly spread.

    A sample, since it must cost nothing beside an evaluation; training changes every element it touches by a little.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu()
        digest.update(f"{name}{chosen.tolist()}".encode())
    return digest.hexdigest()
