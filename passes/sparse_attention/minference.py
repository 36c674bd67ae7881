"""MInference: each head follows a pattern of its own, whose lines or blocks are found in the prompt."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torchaccel.kernels.prompt_selectors.base import PromptSelector
from torchaccel.kernels.prompt_selectors.patterns import HeadPatterns, Pattern
from torchaccel.kernels.row_reference import block_weights
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Reason
from ..layerwise import LayerwiseOptions
from .prompt import PromptMethod

# What the published search tries; their costs are about the same.
CANDIDATES: tuple[Pattern, ...] = (
    ("a_shape", 100, 800),
    ("vertical_and_slash", 30, 800),
    ("vertical_and_slash", 100, 750),
    ("vertical_and_slash", 500, 700),
    ("vertical_and_slash", 3500, 100),
    ("block_sparse", 8, 0),
)
# Names of the published plans.
NAMES = {"stream_llm": "a_shape"}

Asked = tuple[Literal["vertical_and_slash", "a_shape", "stream_llm", "block_sparse"], int, int, float]


class MInferenceOptions(LayerwiseOptions):
    """vertical, slash: columns and diagonals of a head without a plan. block: tokens of a block.

    plan: for each layer, head -> (pattern, two sizes, score), as the published files have it; what is missing has the
    sizes above.
    """

    vertical: int = Field(default=1000, ge=1)
    slash: int = Field(default=6096, ge=1)
    block: Literal[64, 128] = 64
    plan: tuple[dict[int, Asked], ...] | None = None


class MInference(PromptMethod):
    """Chooses for every query head, by its pattern; see ``HeadPatterns``."""

    name = "minference"
    calibration = "optional"
    paper = "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024)"
    Options = MInferenceOptions

    options: MInferenceOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        beyond = [head for head in self._heads(site) if not 0 <= head < site.heads]
        if beyond:
            return Decline(site.name, Reason.NO_SUCH_HEAD, f"head {beyond[0]} of {site.heads}")
        return super().refuse(site)

    def selector(self, site: AttentionSite) -> PromptSelector:
        asked = self.options
        usual: Pattern = ("vertical_and_slash", asked.vertical, asked.slash)
        found = self._heads(site)
        if not found:
            return HeadPatterns(asked.block, (usual,))
        of_head = {head: (NAMES.get(kind, kind), many, near) for head, (kind, many, near, _) in found.items()}
        return HeadPatterns(asked.block, tuple(of_head.get(head, usual) for head in range(site.heads)))

    def _heads(self, site: AttentionSite) -> dict[int, Asked]:
        plan, layer = self.options.plan or (), site.index if site.layer is None else site.layer
        return plan[layer] if layer < len(plan) else {}


def search_patterns(
    spec: AttentionSpec, q: Tensor, k: Tensor, block: int = 64, candidates: tuple[Pattern, ...] = CANDIDATES
) -> tuple[Pattern, ...]:
    """The pattern of every head that holds most of the attention of 64 rows spread over a long prompt.

    q: ``[B, H, S, D]``. k: ``[B, H_kv, S, D]``, of one layer, without padding. spec: of the attention.
    """
    batch, _, tokens, _ = q.shape
    rows = torch.linspace(tokens // 4, tokens - 1, min(64, tokens), device=q.device).long().expand(batch, -1)
    weights = block_weights(spec, q, k, rows, None, block)
    recalls = []
    for pattern in candidates:
        lists = HeadPatterns(block, (pattern,)).select(spec, q, k, None)[:, :, rows[0] // block].long()
        held = torch.zeros(*weights.shape[:3], weights.shape[3] + 1, device=q.device)
        held.scatter_(3, torch.where(lists < 0, weights.shape[3], lists), 1)
        recalls.append((weights * held[..., :-1]).sum((0, 2, 3)))
    best = torch.stack(recalls).argmax(0).tolist()
    return tuple(candidates[i] for i in best)
