"""A batch whose rows share a long prefix: read once for all of them, against once for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...kernels import shared_prefix
from .contender import Contender, Goal, Scenario
from .geometry import Geometry

ROWS, OWN = 16, 128


def scenario(g: Geometry, group: int) -> Scenario:
    """``g.prefix`` shared tokens and 128 own ones for each of 16 rows, with ``group`` query heads per KV head."""
    heads, total = g.kv_heads * group, g.prefix + OWN
    spec = g.spec("decode", group=group)
    candidate = g.candidate(spec)
    q = g.normal(ROWS, heads, 1)
    new = g.normal(ROWS, g.kv_heads, 1)
    k, v = (g.normal(1, g.kv_heads, g.prefix) for _ in range(2))
    own = [g.normal(ROWS, g.kv_heads, OWN + 1) for _ in range(2)]
    whole = [torch.cat([shared.expand(ROWS, -1, -1, -1), mine], 2) for shared, mine in zip((k, v), own, strict=True)]
    separate: Any = partial(g.seed(spec), q, new, new, *whole, torch.tensor([0, total, total]), None, None)
    level = shared_prefix.Level(k, v, g.prefix)
    lens = torch.tensor([0, OWN, OWN])
    shared: Any = partial(shared_prefix.attend, spec, candidate, [level], q, new, new, *own, lens)
    flops = 4.0 * ROWS * heads * total * g.head_dim
    token = 2.0 * g.kv_heads * g.head_dim * 2
    found = [
        Contender("torchaccel:separate", [separate], ROWS * total * token, flops),
        Contender("torchaccel:shared", [shared], (g.prefix + ROWS * OWN) * token, flops),
    ]
    truth = separate()
    found[1].error = float((shared().float() - truth.float()).abs().max())
    goal = Goal(
        "torchaccel:shared", "times separately", 6.0, lambda ms: ms["torchaccel:separate"] / ms["torchaccel:shared"]
    )
    return Scenario(f"shared prefix {g.prefix} x {ROWS}, group {group}", found, lambda _: [goal], 9)
