"""One attention problem: seeded queries, keys and values, in as many copies as it takes to leave the caches cold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...cost.probe import cache_bytes
from ...kernels import reference
from ...kernels.spec import DTYPES, AttentionSpec, KVFormat
from ..models import ModelFacts

# The copies together are this many times as large as the last cache.
COLD = 4
# Results of so many queries are compared with the float32 reference, whose scores are kept whole.
COMPARED = 128


@dataclass(frozen=True)
class Problem:
    """Inputs of one layer's attention: q ``[B, H, Q, D]``, and copies of (k, v) ``[B, H_kv, K, D]`` with other content.

    Q is 1 in decode, where the last of the K = context + 1 keys is the new token's, and Q = K = context in prefill.
    ``model`` is the model whose geometry it has.
    """

    model: Any
    phase: str
    q: Tensor
    contents: list[tuple[Tensor, Tensor]]

    @staticmethod
    def draw(model: Any, facts: ModelFacts, phase: str, batch: int, context: int) -> Problem:
        """Normal values in the model's dtype, seed 0."""
        device, dtype = model.device, DTYPES[facts.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, tokens: int) -> Tensor:
            shape = (batch, heads, tokens, facts.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        keys, queries = (context + 1, 1) if phase == "decode" else (context, context)
        size = 2 * batch * facts.kv_heads * keys * facts.head_dim * dtype.itemsize
        # On a GPU the clock flushes the cache before every call.
        copies = 1 if device.type == "cuda" else -(-COLD * cache_bytes(device) // size)
        contents = [(normal(facts.kv_heads, keys), normal(facts.kv_heads, keys)) for _ in range(copies)]
        return Problem(model, phase, normal(facts.heads, queries), contents)

    @property
    def causal(self) -> bool:
        """Whether a causal mask hides anything: not from the one new token of decode."""
        return self.phase == "prefill"

    @property
    def scale(self) -> float:
        """The usual scale of the scores, ``D ** -0.5``."""
        return float(self.q.shape[3] ** -0.5)

    def truth(self) -> Tensor:
        """Dense attention of the last queries over the first content, float32 ``[B, H, <= COMPARED, D]``."""
        q, (k, v) = self.q[:, :, -COMPARED:], self.contents[0]
        dense = KVFormat("dense", "float32", q.shape[3])
        spec = AttentionSpec("prefill", q.shape[3], q.shape[1] // k.shape[1], "float32", dense, dense, self.scale)
        columns = torch.arange(k.shape[2], device=q.device)
        queries = columns[-q.shape[2] :]
        wide = columns.expand(q.shape[0], 1, -1)
        return reference.attend(replace(spec, causal=self.causal), q.float(), k, v, wide, queries, None).out

    def error(self, result: Tensor, truth: Tensor) -> float:
        """Largest distance of a result ``[B, H, Q, D]`` on the first content from the truth."""
        return (result[:, :, -COMPARED:].float() - truth).abs().max().item()


@dataclass
class Operator:
    """An implementation bound to a problem: one call per content, taken in turn, and the bytes of one cache."""

    calls: Sequence[Callable[[], Tensor]]
    kv_bytes: int
    turn: int = 0

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The next call in turn; the very first one is on the first content."""
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        return call()
