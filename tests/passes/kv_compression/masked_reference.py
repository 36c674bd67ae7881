"""An eviction method as a mask over eager attention: every token stays in the cache, evicted ones are not attended to.

A method is an object with two functions of plain tensors, written from its publication and sharing nothing with the
package: ``prompt`` says which tokens are alive after the prompt, ``step`` which are after a later call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


class Rule:
    """alive: bool ``[B, H_kv, S]``. Subclasses override both; ``weights`` is the softmax ``[B, H, Q, S]``, float32."""

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, layer: int, weights: Tensor, alive: Tensor) -> Tensor:
        return alive

    def asked(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Shows the queries of a later call, before ``step``, with all keys and values as they were computed."""

    def stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache holds of keys and values ``[B, H_kv, S, D]``, from the first call after the prompt on."""
        return k, v


def masked(model: Any, rule: Rule) -> Any:
    """``model`` (in place) with attention that obeys ``rule``; one sequence of calls, from its prompt on."""
    alive: dict[int, Tensor] = {}

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        layer, group = module.layer_idx, q.shape[1] // k.shape[1]
        fresh = q.shape[2] == k.shape[2]
        if not fresh:
            rule.asked(layer, q, k, v)
            k, v = rule.stored(layer, k, v)
        wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ wide_k.transpose(2, 3)).float() * scaling
        if mask is not None:
            scores = scores + mask[..., : k.shape[2]].float()
        if not fresh:
            now = alive[layer]
            now = torch.cat([now, now.new_ones(*now.shape[:2], k.shape[2] - now.shape[2])], 2)
            scores = scores.masked_fill(~now.repeat_interleave(group, 1)[:, :, None], -torch.inf)
        weights = torch.softmax(scores, -1)
        if fresh:
            valid = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
            if mask is not None:
                valid = (mask[:, 0, -1, : k.shape[2]] == 0).expand(k.shape[0], -1)
            alive[layer] = rule.prompt(layer, q, k, v, weights * valid[:, None, :, None], valid)
        else:
            alive[layer] = rule.step(layer, weights, now)
        return (weights.to(v.dtype) @ wide_v).transpose(1, 2).contiguous(), None

    name = f"masked_{id(rule)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model


def marked(kept: Tensor, tokens: int) -> Tensor:
    """Columns ``[B, H, n]`` as a mask ``[B, H, tokens]``."""
    return torch.zeros(*kept.shape[:2], tokens, dtype=torch.bool).scatter_(2, kept, True)


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Query heads ``[B, H, ...]`` by KV head ``[B, H_kv, G, ...]``."""
    return x.unflatten(1, (kv_heads, -1))
