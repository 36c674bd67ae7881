"""Bidirectional attention of an image's tokens over the regions that are chosen for each of its regions."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from . import registry
from .plan import Plan
from .prompt_selectors.regions import RoutedRegions
from .sparse_prompt import SparsePrompt


def attend(plan: SparsePrompt, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The attention ``[B, H, S, D]``, and the share of all pairs of tokens that it read, a float32 scalar.

    q: ``[B, H, S, D]``. k, v: ``[B, H_kv, S, D]``. grid: rows and columns of the patches among the tokens. Tokens that
    cannot be of the grid attend to everything, as few ones do.
    """
    assert isinstance(plan.selector, RoutedRegions)
    tokens, selector = k.shape[2], replace(plan.selector, grid=grid)
    layout = selector.layout(tokens)
    if layout is None or replace(plan, selector=selector).runs_dense(tokens):
        return registry.attend_prompt(plan.dense.key())(q, k, v, None), q.new_ones((), dtype=torch.float32)
    slots = layout.slots(q.device)
    q, k, v = (layout.arrange(x, slots) for x in (q, k, v))
    index = selector.route(layout, q, k)
    kernel, mask = plan.sparse.key(), None
    if layout.is_padded:
        kernel, mask = _masked(plan.sparse), (slots >= 0).expand(1, 1, slots.shape[0], -1)
    out = registry.attend_prompt(kernel)(q, k, v, mask, index)
    return out.index_select(2, layout.places(slots)), layout.share_read(index)


@lru_cache(maxsize=256)
def _masked(plan: Plan) -> str:
    """The key of ``plan`` with a mask: kernels read grids that fill their regions without one."""
    return replace(plan, spec=replace(plan.spec, mask="bool")).key()
