"""A graph while its attention is lowered: what every lowering of a site reads and adds to."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torchaccel.kernels.candidates import unsupported
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec, KVFormat, dtype_name

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Reason, RewriteContext, SitePlan
from .choice import Chooser
from .lowered import LoweredSite
from .ragged import marks_of
from .signature import Signature
from .site import fake, site_shape


class Draft:
    """One graph's signature, the choice of its kernels, and a line for every site and every decline so far."""

    def __init__(self, context: RewriteContext, example_inputs: list[Any], chooser: Chooser):
        self.context = context
        self.chooser = chooser
        self.graph: Graph = context.graph
        self.signature = Signature(self.graph, example_inputs)
        self.sites: list[LoweredSite] = []
        self.declines: list[Decline] = []

    def spec(self, site: AttentionSite, plan: SitePlan, phase: Any, key: KVFormat, value: KVFormat) -> AttentionSpec:
        """The attention of a site under its plan, in graphs of ``phase``, with keys and values in these formats."""
        mask = "none"
        if site.mask is not None:
            mask = "bool" if fake(site.mask).dtype == torch.bool else "additive"
        return AttentionSpec(
            phase=phase,
            head_dim=site.head_dim,
            group=site.heads // site.kv_heads,
            dtype=dtype_name(site.dtype),
            key_format=key,
            value_format=value,
            scale=float(site.scale),
            causal=site.causal or plan.window is not None,
            softcap=None if site.softcap is None else float(site.softcap),
            mask=mask,  # type: ignore[arg-type]
            window=plan.window,
            sinks=plan.sinks,
            head_windows=plan.window is not None and plan.bound is not None,
        )

    def bound(self, site: AttentionSite, spec: AttentionSpec, plan: SitePlan) -> Node | None:
        """Which KV heads the window of ``spec`` binds, where it does not bind all."""
        if not spec.head_windows or plan.bound is None:
            return None
        with self.graph.inserting_before(site.node):
            return marks_of(plan.bound, self.graph, self.context.device)

    def shape(self, site: AttentionSite, tokens: int) -> AttentionShape:
        """The sizes of a site with ``tokens`` stored."""
        return site_shape(site, tokens, len(self.context.anatomy.attentions))

    def note(self, site: AttentionSite, choice: Plan, shape: AttentionShape, layout: str, plan: SitePlan) -> None:
        """Add a line for a site that was lowered, and say so where its kernel is not a generated one."""
        name = choice.pick(shape.tokens).implementation
        switches = tuple((limit, candidate.key()) for limit, candidate in choice.picks)
        predicted = self.chooser.predicted_ms(choice, shape)
        self.sites.append(
            LoweredSite(site.name, name, layout, plan.window, plan.sinks, switches, predicted, bound=plan.bound)
        )
        reason = unsupported(choice.spec, self.context.device.type)
        if reason is not None:
            self.declines.append(Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason))
