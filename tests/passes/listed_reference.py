"""A method that retrieves as a mask over eager attention: every token is stored, and a step sees what a rule lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


class Lister:
    """Tokens ``[B, H_kv, S]`` (bool) that a step reads, of all that are stored, the newest included.

    q: ``[B, H, 1, D]``. k: ``[B, H_kv, S, D]``. valid: bool ``[B, S]``, False for padding.
    """

    def prompt(self, layer: int, q: Tensor, k: Tensor, weights: Tensor, valid: Tensor) -> None:
        """Called once, with the prompt's tokens, and ``weights`` ``[B, H, S, S]``."""

    def step(self, layer: int, q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        raise NotImplementedError

    def attended(self, layer: int, weights: Tensor) -> None:
        """Called after a step with its attention ``[B, H, S]``."""


def listing(model: Any, rule: Lister) -> Any:
    """``model`` (in place) with attention that reads what ``rule`` lists; one sequence of calls, from its prompt on."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ wide_k.transpose(2, 3)).float() * scaling
        valid = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
        if mask is not None:
            scores = scores + mask[..., : k.shape[2]].float()
            valid = (mask[:, 0, -1, : k.shape[2]] == 0).expand(k.shape[0], -1)
        if q.shape[2] == 1:
            seen = rule.step(module.layer_idx, q, k, valid)
            seen[..., -1] = True
            scores = scores.masked_fill(~seen.repeat_interleave(group, 1)[:, :, None], -torch.inf)
        weights = torch.softmax(scores, -1)
        if q.shape[2] == 1:
            rule.attended(module.layer_idx, weights[:, :, 0])
        if q.shape[2] == k.shape[2]:
            rule.prompt(module.layer_idx, q, k, weights * valid[:, None, :, None], valid)
        return (weights.to(v.dtype) @ wide_v).transpose(1, 2).contiguous(), None

    name = f"listing_{id(rule)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model


def numbered(blocks: Tensor, size: int, tokens: int) -> Tensor:
    """The tokens of blocks of ``size``, as a mask ``[tokens]``."""
    return torch.isin(torch.arange(tokens) // size, blocks)
