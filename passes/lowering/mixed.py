"""Attention over caches whose tokens are sorted into classes, with formats of their own."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torchaccel.kernels import mixed_precision
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.propagate import annotate
from torchaccel.runtime.layout import Layout

from .choice import Chooser
from .signature import Signature


@dataclass(frozen=True)
class MixedLowering:
    """Puts one kernel for each class of tokens, and one for the newest tokens, in the place of an attention."""

    graph: Graph
    signature: Signature
    chooser: Chooser

    def attend(
        self,
        site: AttentionSite,
        spec: AttentionSpec,
        newest: list[Node],
        layouts: tuple[Layout, Layout],
        shape: AttentionShape,
    ) -> Plan:
        """Replace ``site``; newest: key buffer, value buffer and positions of the newest tokens. Returns their plan.

        Values were divided by a scale for each channel before they were stored: so are new ones, and the result of
        attention, which is linear in them, is multiplied by it.
        """
        keys, values, mixing = site.key_cache.past, site.value_cache.past, layouts[0].mixing
        assert keys is not None and values is not None and mixing is not None
        count = len(mixing.formats)
        classes: list[Node] = []
        for index in range(count):
            names = (keys, 0, f"class{index}"), (values, 1, f"class{index}"), (keys, 0, f"places{index}")
            classes += [self.signature.buffer(past, layouts[which], name) for past, which, name in names]
        scale = self.signature.buffer(values, layouts[1], "scale")
        scale.meta["example_value"] = values.meta["example_value"].scale
        lens = self.signature.placeholder(f"{keys.name}_lens", torch.zeros(1 + count, 3, dtype=torch.int64))
        choice = self.chooser.plan(mixed_precision.spec_of(spec), shape)
        others = [self.chooser.plan(mixed_precision.spec_of(spec, of_class), shape) for of_class in mixing.formats]
        *buffers, positions = newest
        with self.graph.inserting_before(site.node):
            divided = annotate(self.graph.call_function(operator.truediv, (site.value_cache.new, scale)))
            wide = annotate(self.graph.call_method("repeat_interleave", (scale, spec.group, 1)))
            tokens = (site.q, site.key_cache.new, divided, *buffers, lens, site.mask, positions, classes)
            plans = [plan.key() for plan in (choice, *others)]
            attended = self.graph.call_function(torch.ops.torchaccel.attend_mixed.default, (*tokens, *plans))
            out = self.graph.call_function(operator.mul, (attended, wide))
        attended.meta, out.meta = dict(site.node.meta), dict(site.node.meta)
        site.node.replace_all_uses_with(out)
        self.graph.erase_node(site.node)
        return choice
