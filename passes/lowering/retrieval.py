"""The lists of tokens that steps read: made in the graph by a policy, for a site and those that share its choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime import selection
from torchaccel.runtime.kv import LogicalKV
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.listing import Listing
from torchaccel.runtime.selection import Selection
from torchaccel.runtime.storage import sizes

from .signature import Signature


@dataclass(frozen=True)
class Lists:
    """What a site reads: node int32 ``[B, H_kv, width]``, made by ``policy`` beyond ``least`` stored tokens.

    pruned: whether the site that they were made for stores some tokens only.
    """

    index: Node
    policy: Listing
    least: int
    pruned: bool


class Retrieval:
    """The lists of one graph; ``made`` has them by the index of the site whose state they were made from."""

    def __init__(self, graph: Graph, signature: Signature):
        self.graph = graph
        self.signature = signature
        self.made: dict[int, Lists] = {}

    def lists(
        self,
        site: AttentionSite,
        leader: int | None,
        layout: Layout,
        lens: Node,
        ids: Node | None,
        least: Callable[[Selection], int],
    ) -> Lists | None:
        """The lists of ``site``, or those that it shares with ``leader``; None where it reads everything.

        layout: of its keys. lens: the lengths of its cache. ids: of the new tokens, or None. least: see ``Lists``.
        """
        policy = layout.selection
        if policy is None:
            found = None if leader is None else self.made.get(leader)
            return found if found is not None and found.pruned == layout.pruned else None
        state, made = self.state(site, layout), least(policy)
        arguments = (
            site.q,
            site.key_cache.new,
            state,
            lens,
            site.mask,
            ids if policy.token_ids else None,
            made,
            policy.key(),
        )
        with self.graph.inserting_before(site.node):
            index = self.graph.call_function(selection.operator(), arguments)
        self.made[site.index] = Lists(index, policy, made, layout.pruned)
        return self.made[site.index]

    def state(self, site: AttentionSite, layout: Layout) -> list[Node]:
        """Inputs for what the policy of ``layout`` remembers of the cache of ``site``, of a plain one made here."""
        policy, past = layout.selection, site.key_cache.past
        assert policy is not None and past is not None
        plain = not isinstance(past.meta["example_value"], LogicalKV)
        kv = self.signature.logical(past, layout)
        state = []
        # Not inner tensors of the logical one, whose guards cost time in every call: sizes follow from the buffer's.
        for name, (shape, dtype) in policy.shapes(sizes(layout.format, kv.buf)).items():
            example = kv.buf.new_empty(shape, dtype=dtype, device="cpu" if name in policy.host else kv.device)
            if plain and len(shape) > 2:
                torch._dynamo.maybe_mark_dynamic(example, 2)
            state.append(self.signature.placeholder(f"{past.name}_{name}", example))
        if plain:
            with self.graph.inserting_before(site.node):
                self.graph.call_function(selection.adoption(), (past, state, site.mask, policy.key()))
        return state
