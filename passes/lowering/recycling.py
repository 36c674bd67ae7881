"""Lowers the steps of caches that recycle what the last full step attended to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime import recycling
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.selection import Selection

from .choice import Chooser
from .gate import retrieving
from .retrieval import Retrieval
from .site import replace_site


class RecyclingLowering:
    """Puts one operator in the place of an attention and of the list it reads: each changes the other."""

    def __init__(self, retrieval: Retrieval, chooser: Chooser):
        self.retrieval = retrieval
        self.chooser = chooser

    def attend(
        self,
        site: AttentionSite,
        spec: AttentionSpec,
        args: tuple[Any, ...],
        layout: Layout,
        shape: AttentionShape,
        least: Callable[[Selection], int],
    ) -> tuple[Plan, AttentionShape]:
        """The plan of the steps that read a list, and what they read; args, layout, least: as of other steps."""
        policy = layout.selection
        assert policy is not None
        whole = self.chooser.plan(replace(spec, mass=True), shape)
        shape = replace(shape, density=policy.share, listed=policy.listed)
        choice = self.chooser.plan(replace(retrieving(spec, policy), mass=True), shape)
        state = self.retrieval.state(site, layout)
        recycled = (*args, state, least(policy), policy.key(), choice.key(), whole.key())
        replace_site(self.retrieval.graph, site, recycling.operator(), recycled)
        return choice, shape
