"""Attention over a cache whose KV heads keep different numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.ragged import PAGE
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import HeadWindows
from torchaccel.runtime.layout import Layout

from ..base import Decline, Reason
from .choice import Chooser
from .signature import Signature
from .site import replace_site


@dataclass(frozen=True)
class RaggedLowering:
    """Puts a kernel over lists of pages in the place of an attention; ``declines``: where to say what is left out."""

    graph: Graph
    signature: Signature
    chooser: Chooser
    declines: list[Decline]

    def attend(
        self, site: AttentionSite, spec: AttentionSpec, buffers: list[Any], layout: Layout, shape: AttentionShape
    ) -> Plan:
        """Replace ``site``; buffers: keys, values, positions. Returns the plan of the kernel."""
        past = site.key_cache.past
        assert past is not None and layout.eviction is not None
        windows = layout.eviction.windows
        if windows is not None and spec.window is not None:
            self.declines.append(Decline(site.name, Reason.RAGGED_WINDOW))
        spec, bound = ragged_spec(spec, windows), None
        if windows is not None:
            with self.graph.inserting_before(site.node):
                bound = marks_of(windows, self.graph, self.chooser.device)
        k_pool, v_pool, positions = buffers
        table, tails = (self.signature.buffer(past, layout, name) for name in ("pages", "tails"))
        lens = self.signature.placeholder(f"{past.name}_lens", torch.zeros(4, dtype=torch.int64))
        choice = self.chooser.plan(spec, shape)
        new = site.key_cache.new, site.value_cache.new
        args = (site.q, *new, k_pool, v_pool, lens, site.mask, positions, table, tails, bound, choice.key())
        replace_site(self.graph, site, torch.ops.torchaccel.attend_ragged.default, args)
        return choice


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
