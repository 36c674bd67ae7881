"""The kernel of attention over a cache whose KV heads keep different numbers of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Graph, Node
from torchaccel.kernels.ragged import PAGE
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.runtime.eviction import HeadWindows


def ragged_spec(spec: AttentionSpec, windows: HeadWindows | None) -> AttentionSpec:
    """``spec`` over lists of pages; windows: those of single heads, which replace that of all."""
    # Slots to come are told by their columns alone, so attention is causal whatever else the mask says.
    spec = replace(spec, positions=True, index="blocks", index_block=PAGE, causal=True)
    if windows is None:
        return spec
    return replace(spec, head_windows=True, window=windows.recent, sinks=windows.sinks)


def marks_of(windows: HeadWindows, graph: Graph, device: torch.device) -> Node:
    """A constant of the graph: int32 ``[H_kv]``, 1 for heads with a window."""
    marks = [int(bound) for bound in windows.bound]
    return graph.call_function(torch.tensor, (marks,), {"dtype": torch.int32, "device": device})
