"""The truth about kernels that read a part of their weights: plain PyTorch, float32 inside, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused_reference import FUNCTIONS
from .sparse_spec import SparseMlpSpec


def by_neuron(gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of an MLP, gate and up ``[F, hidden]`` and down ``[hidden, F]``, with each neuron's side by side.

    Returns gate, up and down transposed, all ``[F, hidden]``: views of one tensor ``[F, 3, hidden]``, of which a stock
    matrix product takes gate, up and down transposed back as they are.
    """
    return torch.stack([gate, up, down.T], 1).unbind(1)  # type: ignore[return-value]


def sparse_mlp(
    spec: SparseMlpSpec, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor | None = None
) -> Tensor:
    """What ``spec`` says: x ``[..., hidden]``; weights as ``by_neuron`` gives them; y like x."""
    rows = x.reshape(-1, x.shape[-1]).float()

    def hidden(row: Tensor, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        h = FUNCTIONS[spec.activation](row @ gate[index].float().T) * (row @ up[index].float().T)
        return h.to(x.dtype).float(), down[index].float()

    if neurons is None:
        h, w = hidden(rows, slice(None))
        return (h @ w).to(x.dtype).view(x.shape)
    lists = neurons.long().expand(rows.shape[0], -1)
    found = rows.new_empty(rows.shape)
    for m, listed in enumerate(lists):
        if (listed >= gate.shape[0]).any():
            found[m] = torch.nan
            continue
        h, w = hidden(rows[m], listed[listed >= 0])
        found[m] = h @ w
    return found.to(x.dtype).view(x.shape)


def threshold_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> list[Tensor]:
    """``ThresholdLinearSpec`` for weights that share x ``[..., K]``, each with a threshold; y ``[..., N]``."""
    rows = x.reshape(-1, x.shape[-1]).float()
    results = []
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        kept = torch.where(rows.abs() <= threshold, 0.0, rows)
        # What no row needs does not enter, whatever it is.
        read = (kept != 0).any(0)
        y = kept[:, read] @ weight[read].float()
        y = y if bias is None else y + bias.float()
        results.append(y.to(x.dtype).view(*x.shape[:-1], weight.shape[1]))
    return results
