"""The attention matrix of six tokens that the methods' worked examples share."""

import torch
from torch import Tensor

from torchaccel.runtime.eviction import Prompt

# Row: query, column: key.
A6 = torch.tensor(
    [
        [1, 0, 0, 0, 0, 0],
        [0.5, 0.5, 0, 0, 0, 0],
        [0.2, 0.3, 0.5, 0, 0, 0],
        [0.3, 0.1, 0.1, 0.5, 0, 0],
        [0.1, 0.4, 0.1, 0.1, 0.3, 0],
        [0.05, 0.15, 0.4, 0.1, 0.1, 0.2],
    ]
)


def prompt_of(attention: Tensor, window: int = 1, layer: int = 0, layers: int = 1) -> Prompt:
    """A prompt of one head whose queries attend as ``attention`` ``[S, S]`` says: keys are unit vectors."""
    tokens = attention.shape[0]
    logits = attention.clamp(min=1e-30).log()[None, None]
    keys = torch.eye(tokens)[None, None]
    valid = torch.ones(1, tokens, dtype=torch.bool)
    mass = attention.sum(0)[None, None]
    return Prompt(logits[:, :, tokens - window :], keys, keys, mass, valid, 1.0, layer, layers, 8.0)
