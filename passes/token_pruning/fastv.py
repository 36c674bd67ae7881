"""FastV: after an early layer, only the prompt tokens that the last token attends to most go on."""

from __future__ import annotations

import operator

import torch
from pydantic import Field
from torch.fx import Node

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.narrow import narrow_sequence
from torchaccel.graph.propagate import annotate
from torchaccel.graph.sequence import UntrackedSequenceError

from ..base import Decline, Fidelity, Method, MethodOptions, PassResult, Reason, RewriteContext
from ..dead_code import remove_dead_code

PARTS = 1000


class FastVOptions(MethodOptions):
    """keep: share of the prompt tokens that go on. layer: the first layer that runs on the kept tokens only."""

    keep: float = Field(default=0.5, gt=0.0, le=1.0)
    layer: int = Field(default=2, ge=1)


def rank_tokens(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, keep: int) -> torch.Tensor:
    """Sorted columns int64 ``[B, keep]`` with the largest attention from the last token, averaged over query heads.

    q: ``[B, H, S, D]``; k: ``[B, H_kv, S, D]``; mask: as attention's, or None. The last token and the first unmasked
    one (the attention sink) are always kept; padding is kept only when a row has fewer than ``keep`` tokens.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    last = q[:, :, -1].float().unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.matmul(last, k.float().transpose(2, 3)).flatten(1, 2) * scale
    if mask is not None:
        row = mask[:, :, -1]
        scores = scores.masked_fill(~row, -torch.inf) if mask.dtype == torch.bool else scores + row.float()
    weight = scores.softmax(-1).mean(1)
    columns = torch.arange(k.shape[2], device=k.device)
    seen = torch.isfinite(scores).any(1) if mask is not None else torch.ones_like(weight, dtype=torch.bool)
    first = seen.int().argmax(-1, keepdim=True)
    weight = torch.where(seen, weight, -torch.ones_like(weight))
    protected = (columns == first) | (columns == k.shape[2] - 1)
    weight = torch.where(protected, torch.full_like(weight, 2.0), weight)
    return weight.topk(keep, dim=-1).indices.sort(-1).values


class FastV(Method):
    """Prunes the prompt in prefill; the cache of later layers holds the kept tokens with their columns.

    The attention row of the last token is recomputed at the boundary from q and k of the layer before it (one row: the
    fused kernels give no attention weights). Positions stay absolute.
    """

    name = "fastv"
    family = "token_pruning"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill"})
    paper = "An Image is Worth 1/2 Tokens After Layer 2 (2024)"
    Options = FastVOptions

    options: FastVOptions

    def apply(self, context: RewriteContext) -> PassResult:
        anatomy, layer = context.anatomy, self.options.layer
        if anatomy.logits is None or not anatomy.logits.last_only:
            return self.result([], [Decline("graph", Reason.ALL_LOGITS)])
        if layer >= len(anatomy.layers):
            detail = f"layer {layer} of {len(anatomy.layers)}"
            return self.result([], [Decline("graph", Reason.TOO_FEW_LAYERS, detail)])
        ranking = anatomy.layers[layer - 1].attention
        if ranking is None or any(entry.attention is None for entry in anatomy.layers[layer:]):
            return self.result([], [Decline(f"layer {layer}", Reason.NO_LAYERS)])
        windowed = [e.attention for e in anatomy.layers[layer - 1 :] if e.attention and e.attention.key_cache.window]
        if windowed:
            return self.result([], [Decline(windowed[0].name, Reason.SLIDING_WINDOW)])
        length = anatomy.query_length
        if isinstance(length, int) and int(length * self.options.keep) < 2:
            return self.result([], [Decline("graph", Reason.SHORT_PROMPT, f"{length} tokens")])
        if not context.fuel.take():
            return self.result([], [Decline("graph", Reason.OUT_OF_FUEL)])
        boundary = anatomy.layers[layer].input
        keep = self._insert_ranking(context, ranking)
        try:
            narrow_sequence(context.graph, boundary, keep)
        except UntrackedSequenceError as error:
            remove_dead_code(context.graph)
            return self.result([], [Decline(f"layer {layer}", Reason.OPAQUE_SEQUENCE, str(error))])
        sites = [entry.attention for entry in anatomy.layers[layer:] if entry.attention is not None]
        for site in sites:
            context.plan(site).keep = keep
        context.refresh()
        return self.result([site.name for site in sites], [], f"keeps {self.options.keep:.0%} after layer {layer - 1}")

    def _insert_ranking(self, context: RewriteContext, site: AttentionSite) -> Node:
        graph = context.graph
        with graph.inserting_after(site.node):
            length = graph.call_function(torch.ops.aten.sym_size.int, (site.q, 2))
            # Whole numbers only: a float of a symbolic length would specialise the graph to it.
            share = graph.call_function(operator.mul, (length, round(self.options.keep * PARTS)))
            count = graph.call_function(operator.floordiv, (share, PARTS))
            keep = graph.call_function(rank_tokens, (site.q, site.k, site.mask, site.scale, count))
            for earlier, later in ((length, share), (share, count), (count, keep)):
                earlier.append(later)
            for node in (length, share, count, keep):
                annotate(node)
        return keep
