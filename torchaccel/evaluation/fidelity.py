"""Distances between logits of a variant and those of the float32 eager model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .results import Fidelity


def compare_logits(logits: Tensor, truth: Tensor, eager: Tensor | None = None) -> Fidelity:
    """Fidelity of ``logits`` to the float32 model's, both ``[tokens, vocabulary]``; ``eager`` is the yardstick."""
    ours, reference = logits.float(), truth.float()
    divergence = F.kl_div(ours.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)
    return Fidelity(
        max_abs_err_vs_fp32=(ours - reference).abs().max().item(),
        eager_max_abs_err_vs_fp32=None if eager is None else (eager.float() - reference).abs().max().item(),
        kl=max(0.0, divergence.item()),
        top1=(ours.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    )


def float32_copy(model: nn.Module) -> nn.Module:
    """A float32 copy of ``model``: the truth that bfloat16 variants, eager included, are compared with."""
    return copy.deepcopy(model).float()


def truth_of(model: nn.Module) -> nn.Module:
    """The float32 model that ``model`` is compared with: itself, or a copy."""
    return model if next(model.parameters()).dtype == torch.float32 else float32_copy(model)


def prefixes(tokens: Tensor, reference: Tensor) -> list[int]:
    """For every row of two ``[B, n]`` tensors the number of leading tokens that are equal."""
    length = min(tokens.shape[1], reference.shape[1])
    return (tokens[:, :length] == reference[:, :length]).long().cumprod(1).sum(1).tolist()


def greedy_prefix(tokens: Tensor, reference: Tensor) -> int:
    """Number of leading tokens on which every row of two ``[B, n]`` tensors agrees."""
    return min(prefixes(tokens, reference))


def equal_share(tokens: Tensor, reference: Tensor) -> float:
    """Share of equal tokens of two ``[B, n]`` tensors, position by position."""
    length = min(tokens.shape[1], reference.shape[1])
    return (tokens[:, :length] == reference[:, :length]).float().mean().item() if length else 1.0
