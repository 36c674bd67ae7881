"""Which model a calibration plan was made for, and whether another one is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchaccel.errors import CalibrationError

# Values of each weight that its fingerprint is made of.
SAMPLES = 64


@dataclass(frozen=True)
class SiteShape:
    """One attention of a model: its query heads, KV heads and head dimension."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} query heads over {self.kv_heads} KV heads of {self.head_dim}"


@dataclass(frozen=True)
class ModelIdentity:
    """architecture: the model's class. sites: its attentions in order. weights: fingerprints of its matrices, sorted.

    Fingerprints are of values rounded to bfloat16: a model loaded in float32 and in bfloat16 is the same one.
    """

    architecture: str
    sites: tuple[SiteShape, ...]
    weights: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The identity as JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> ModelIdentity:
        """What ``to_dict`` gave; raises ``KeyError`` or ``TypeError`` for anything else."""
        sites = tuple(SiteShape(**site) for site in found["sites"])
        return ModelIdentity(str(found["architecture"]), sites, tuple(found["weights"]))

    def check_sites(self, sites: Iterable[SiteShape], what: str) -> None:
        """Raise ``CalibrationError`` unless a model's attentions are these; what: the plan, in words."""
        found = tuple(sites)
        if len(found) != len(self.sites):
            raise CalibrationError(
                f"{what} was made for {self.architecture} with {len(self.sites)} attention layers; this model has "
                f"{len(found)}. Calibrate this model"
            )
        for index, (own, other) in enumerate(zip(self.sites, found, strict=True)):
            if own != other:
                raise CalibrationError(
                    f"{what} was made for {self.architecture}, whose attention layer {index} has {own}; this model's "
                    f"has {other}. Calibrate this model"
                )

    def check_weights(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raise ``CalibrationError`` unless these weights, or some of them, are the model's; what: the plan, in words.

        A part of the model lacks some weights, and a model that the calibrated one is a part of has further ones; only
        weights that differ are both.
        """
        found, own = fingerprints(tensors), set(self.weights)
        if found - own and own - found:
            raise CalibrationError(
                f"{what} was made for {self.architecture} with other weights: {len(found - own)} of the {len(found)} "
                "matrices here are not among those it was made with. Calibrate the model with the weights it runs with"
            )


def fingerprints(tensors: Iterable[Tensor]) -> set[str]:
    """A short digest for each matrix among ``tensors``: of its shape and ``SAMPLES`` of its values."""
    return {_digest(t.detach()) for t in tensors if t.dim() > 1 and t.is_floating_point()}


def weights_of(model: nn.Module) -> tuple[str, ...]:
    """The fingerprints of a model's matrices, sorted."""
    return tuple(sorted(fingerprints(model.parameters())))


def _digest(x: Tensor) -> str:
    flat = x.reshape(-1)
    places = torch.linspace(0, max(flat.shape[0] - 1, 0), SAMPLES, dtype=torch.float64).long()
    values = flat[places.to(x.device)].to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(repr(tuple(x.shape)).encode() + values.numpy().tobytes()).hexdigest()[:16]
