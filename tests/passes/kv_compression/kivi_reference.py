"""KIVI's storage, written anew: blocks of tokens quantised in groups, the most recent tokens as they are."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache


def quantised(x: Tensor, group: int, bits: int) -> Tensor:
    """Asymmetric quantisation of groups of ``group`` along the last dimension, float16 scale and minimum, read back."""
    x = x.unflatten(-1, (-1, group))
    low = x.amin(-1, keepdim=True).half().float()
    steps = 2**bits - 1
    step = ((x.amax(-1, keepdim=True) - low).clamp(min=0) / steps * (1 + 2**-10)).half().float()
    step = step.masked_fill(step == 0, 1.0)
    return (((x - low) / step).round().clamp(0, steps) * step + low).flatten(-2)


def stored(keys: Tensor, values: Tensor, bits: int, group: int, window: int) -> tuple[Tensor, Tensor]:
    """What is read back of ``[B, H, S, D]``: keys per channel along tokens, values per token along channels."""
    block = max(64, group)
    done = max(0, keys.shape[2] - window) // block * block
    keys, values = keys.clone(), values.clone()
    if done:
        keys[:, :, :done] = quantised(keys[:, :, :done].transpose(2, 3), group, bits).transpose(2, 3)
        size = group if values.shape[3] % group == 0 else values.shape[3]
        values[:, :, :done] = quantised(values[:, :, :done], size, bits)
    return keys, values


def compressed(cache: DynamicCache, bits: int, group: int, window: int) -> DynamicCache:
    """A cache of what ``stored`` gives for every layer."""
    out = DynamicCache()
    for index, layer in enumerate(cache.layers):
        out.update(*stored(layer.keys, layer.values, bits, group, window), index)
    return out
