"""What lowering made of a graph: its new signature, and a line per attention site for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.shape import AttentionShape
from torchaccel.runtime.bindings import Bindings

from ..base import Decline


@dataclass
class LoweredSite:
    """What became of one attention site: the kernel that runs it and the layouts of its cache.

    switches: the candidates by the number of stored tokens up to which each runs, the last one without a limit.
    predicted_ms: of one call, with as many tokens stored as when the graph was compiled. gate: what the cost model
    predicts of the lossy site against the exact one, in one line. rotary: whether the kernel does the rotary embedding
    of the queries and the new keys, too. bound: which KV heads the window binds, None for all. listed, listed_share:
    tokens of the list that a step reads, None without one, and the part of what is stored that it reads besides.
    selector: who chooses what a prompt or an encoder reads; sparse_from: the least number of tokens of which it does,
    fewer attend to everything.
    """

    site: str
    kernel: str
    layout: str
    window: int | None = None
    sinks: int = 0
    switches: tuple[tuple[int | None, str], ...] = ()
    predicted_ms: float | None = None
    gate: str = ""
    rotary: bool = False
    bound: tuple[bool, ...] | None = None
    listed: int | None = None
    listed_share: float = 0.0
    selector: str = ""
    sparse_from: int | None = None


@dataclass
class Lowered:
    """The rewritten graph's signature, the example inputs of its new placeholders, and a line per site.

    compared: lossy attention and exact attention whose times the gate asked for; a tuner measures both.
    """

    bindings: Bindings
    inputs: list[Any]
    sites: list[LoweredSite] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    compared: list[tuple[AttentionSpec, AttentionShape]] = field(default_factory=list)
