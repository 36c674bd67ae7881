"""``flex_attention``, compiled by Inductor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..runner import Runner
from .problem import Operator, Problem


class FlexOperator(Runner):
    """The generated template with a causal block mask, which is made once, outside of the timed calls."""

    cases = ("attention",)

    def compiles(self, case: str) -> bool:
        """Always."""
        return True

    def build(self, problem: Problem, case: str) -> Operator:
        """Compile the operator alone."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask: Any = None
        if problem.causal:
            length = problem.q.shape[2]
            mask = create_block_mask(_is_past, None, None, length, length, device=problem.q.device.type)
        run = torch.compile(flex_attention, dynamic=False)
        settings = {"block_mask": mask, "scale": problem.scale, "enable_gqa": True}
        calls = [partial(run, problem.q, k, v, **settings) for k, v in problem.contents]
        return Operator(calls, sum(t.nbytes for t in problem.contents[0]))


def _is_past(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
