"""Attention of rows whose caches share prefixes: these are read once for all of their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node
from torchaccel.kernels import shared_prefix
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.kv import prefix_names
from torchaccel.runtime.layout import Layout

from .choice import Chooser
from .signature import Signature
from .site import describe, fake, replace_site, size_of


@dataclass(frozen=True)
class SharedLowering:
    """Puts one kernel for each prefix and one for the rows' own tokens in the place of an attention."""

    graph: Graph
    signature: Signature
    chooser: Chooser

    def attend(
        self,
        site: AttentionSite,
        spec: AttentionSpec,
        buffers: list[Node],
        layouts: tuple[Layout, Layout],
        shape: AttentionShape,
    ) -> tuple[Plan, AttentionShape, str]:
        """Replace ``site``; buffers: of its own keys and values. Returns the plan of the prefix, for what, and a note.

        shape: of the site, with all tokens.
        """
        keys, values = site.key_cache.past, site.value_cache.past
        assert keys is not None and values is not None
        names = prefix_names(layouts[0])
        prefixes: list[Node] = []
        for name in names:
            prefixes += [self.signature.buffer(keys, layouts[0], name), self.signature.buffer(values, layouts[1], name)]
        lens = self.signature.placeholder(f"{keys.name}_lens", torch.zeros(1 + len(names), 3, dtype=torch.int64))
        own, shared = shared_prefix.specs(spec)
        # Which of the tokens are whose is data: for the choice, they are thought to be in the prefix.
        entries = [size_of(getattr(fake(keys), name).shape[0]) for name in names]
        rows = [shape.batch // count for count in entries]
        of_prefix = replace(shape, batch=entries[0], queries=shape.queries * rows[0])
        choice, of_own = self.chooser.plan(shared, of_prefix), self.chooser.plan(own, shape)
        args = (site.q, site.key_cache.new, site.value_cache.new, *buffers, lens, site.mask, prefixes)
        target = torch.ops.torchaccel.attend_shared.default
        replace_site(self.graph, site, target, (*args, of_own.key(), choice.key()))
        text = f"{describe(layouts[0])}, shared prefix of {' and of '.join(str(count) for count in rows)} rows"
        return choice, of_prefix, text


def unshared_reason(spec: AttentionSpec, window: int | None, layouts: tuple[Layout, Layout]) -> str | None:
    """Why the prefixes that a layer's rows share have to be copied; None when there are none, or when they need not."""
    if not any(layout.prefixes for layout in layouts):
        return None
    if layouts[0].prefixes != layouts[1].prefixes:
        return "keys and values share different prefixes"
    if window is not None:
        return f"the layer keeps a sliding window of {window} tokens"
    return shared_prefix.unsupported(spec)
