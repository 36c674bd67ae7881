"""A batch whose rows share a long prefix: read once for all of them, against once for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import shared_prefix
from ...kernels.candidates import build
from .contender import Contender, Goal, Scenario
from .geometry import Geometry

ROWS, OWN = 16, 128
LAYERS = 4


def scenario(g: Geometry, group: int) -> Scenario:
    """``g.prefix`` shared tokens and 128 own ones for each of 16 rows, with ``group`` query heads per KV head."""
    heads, total = g.kv_heads * group, g.prefix + OWN
    q = g.normal(ROWS, heads, 1)
    pairs = [_calls(g, group, q) for _ in range(LAYERS)]
    flops = 4.0 * ROWS * heads * total * g.head_dim
    token = 2.0 * g.kv_heads * g.head_dim * 2
    found = [
        Contender("torchaccel:separate", [separate for separate, _ in pairs], ROWS * total * token, flops),
        Contender("torchaccel:shared", [shared for _, shared in pairs], (g.prefix + ROWS * OWN) * token, flops),
    ]
    separate, shared = pairs[0]
    found[1].error = float((shared().float() - separate().float()).abs().max())
    goal = Goal(
        "torchaccel:shared", "times separately", 6.0, lambda ms: ms["torchaccel:separate"] / ms["torchaccel:shared"]
    )
    return Scenario(f"shared prefix {g.prefix} x {ROWS}, group {group}", found, lambda _: [goal], 9, burst=LAYERS)


def _calls(g: Geometry, group: int, q: Tensor) -> tuple[Any, Any]:
    """The same content attended with a copy of the prefix for every row, and with one for all."""
    spec = g.spec("decode", group=group)
    own_kernel, shared_kernel = (build(part, g.candidate(spec)) for part in shared_prefix.specs(spec))
    new = g.normal(ROWS, g.kv_heads, 1)
    k, v = (g.normal(1, g.kv_heads, g.prefix) for _ in range(2))
    own = [g.normal(ROWS, g.kv_heads, OWN + 1) for _ in range(2)]
    whole = [torch.cat([shared.expand(ROWS, -1, -1, -1), mine], 2) for shared, mine in zip((k, v), own, strict=True)]
    end = g.prefix + OWN
    level = shared_prefix.Level(k, v, g.prefix)
    lens = torch.tensor([0, OWN, OWN])
    return (
        partial(g.seed(spec), q, new, new, *whole, torch.tensor([0, end, end]), None, None),
        partial(shared_prefix.attend, own_kernel, shared_kernel, [level], q, new, new, own[0], own[1], lens),
    )
