"""Stock ``scaled_dot_product_attention``."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.nn import functional as F

from ..runner import Runner
from .problem import Operator, Problem


class Sdpa(Runner):
    """What transformers calls by default, on keys and values that lie ready in one piece."""

    cases = ("attention",)

    def build(self, problem: Problem, case: str) -> Operator:
        """Grouped queries are left to the operator."""
        settings: dict[str, Any] = {"is_causal": problem.causal, "scale": problem.scale, "enable_gqa": True}
        calls = [partial(F.scaled_dot_product_attention, problem.q, k, v, **settings) for k, v in problem.contents]
        return Operator(calls, sum(t.nbytes for t in problem.contents[0]))
