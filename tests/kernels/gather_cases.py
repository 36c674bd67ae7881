"""Tensors of which the same tokens are taken, as every implementation is tested with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchaccel.kernels.gather_spec import GatherSpec, TokenItem

# Hidden states, rotary tables of one row for all, masks, keys, position ids, and a position bias.
SPEC = GatherSpec(
    (TokenItem(1, 2), TokenItem(1, 4), TokenItem(2, 1, True), TokenItem(2, 2), TokenItem(1, 8), TokenItem(2, 4, True))
)
# (batch rows, tokens, kept tokens).
SIZES = [(1, 6, 3), (3, 42, 17), (2, 1, 1), (2, 123, 123), (1, 1100, 1030), (2, 5, 0)]


def gather_case(batch: int, tokens: int, kept: int, width: int = 33) -> tuple[list[Tensor], Tensor]:
    """Inputs of ``SPEC`` and an index int64 ``[batch, kept]``; keys and masks are strided."""
    generator = torch.Generator().manual_seed(tokens)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Every other token by its distance from the end.
    order = [torch.randperm(tokens, generator=generator)[:kept].sort().values for _ in range(batch)]
    inputs = [
        numbers(batch, tokens, width).bfloat16(),
        numbers(1, tokens, 6),
        (numbers(batch, 1, tokens, tokens + 1) > 0)[..., 1:],
        numbers(batch, tokens, 3, 8).half().transpose(1, 2),
        torch.randint(0, 99, (batch, tokens), generator=generator),
        numbers(1, 2, tokens, tokens),
    ]
    index = torch.stack(order)
    index[:, ::2] -= tokens
    return inputs, index
