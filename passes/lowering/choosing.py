"""Lowers attention to everything that makes, on the way, the list by which other sites read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph
from torchaccel.kernels.candidates import unsupported
from torchaccel.kernels.plan import Plan

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.listing import MostAttended

from ..base import Decline, Reason, SitePlan
from .choice import Chooser
from .gate import Gate
from .retrieval import Lists
from .site import fake, replace_site, static

# The place of the list among the results of the operator.
INDEX = 1


class ChoosingLowering:
    """Puts a kernel that tells the mass, and the choice by it, in the place of an attention.

    declines: where to say what stays as it is.
    """

    def __init__(self, graph: Graph, chooser: Chooser, gate: Gate, declines: list[Decline]):
        self.graph = graph
        self.chooser = chooser
        self.gate = gate
        self.declines = declines

    def attend(
        self, site: AttentionSite, plan: SitePlan, layout: Layout, whole: Plan, shape: AttentionShape, args: Any
    ) -> tuple[Plan, Lists] | None:
        """The kernel and the list of a site that chooses for others under its plan; None for any other site.

        whole: its kernel where nothing is chosen. args: of the attention, up to the positions.
        """
        policy = plan.selection
        if not isinstance(policy, MostAttended) or plan.leader is not None or static(fake(site.q).shape[2]) != 1:
            return None
        spec, told = whole.spec, replace(whole.spec, mass=True)
        verdict = self.gate.lists(site, policy, spec, shape.batch, shape.sites)
        reason = unsupported(told, self.chooser.device.type)
        decline = None
        if layout.pruned:
            decline = Decline(site.name, Reason.MOVED_TOKENS)
        elif reason is not None:
            decline = Decline(site.name, Reason.KERNEL_UNSUPPORTED, reason)
        elif verdict is not None and verdict.switch_tokens is None:
            decline = Decline(site.name, Reason.SLOWER, verdict.text)
        if decline is not None:
            self.declines.append(decline)
            return None
        least = self.gate.least(policy, site, spec, shape.batch, shape.sites)
        choice = self.chooser.plan(told, shape)
        # The newest of the listed tokens is the step's own.
        to_choose = (*args, policy.tokens - 1, least, choice.key(), whole.key())
        target = torch.ops.torchaccel.attend_choosing.default
        (index,) = replace_site(self.graph, site, target, to_choose, INDEX)
        return choice, Lists(index, policy, least, pruned=False)
