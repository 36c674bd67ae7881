"""A rule on positions as a mask over eager attention: which earlier tokens a token of a row sees, in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.models.families import build

# Layer, KV head, first live column of the row, columns of query and key, tokens of the call -> whether it is seen.
Rule = Callable[[int, int, int, int, int, int], bool]


def ruled(model: Any, rule: Rule) -> Any:
    """``model`` (in place) whose attention asks ``rule`` for every pair that its own mask lets through."""

    def attention(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scaling: float,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        batch, heads, new, _ = q.shape
        kv_heads, columns = k.shape[1:3]
        seen = (mask[..., :columns] == 0).expand(batch, kv_heads, -1, -1).clone()
        # Of a sliding window the last query does not tell where a row begins: such layers are not ruled.
        firsts = seen[:, 0, -1].int().argmax(-1).tolist()
        for b, h, query, c in seen.nonzero().tolist():
            seen[b, h, query, c] = rule(module.layer_idx, h, firsts[b], columns - new + query, c, new)
        k, v, seen = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v, seen))
        scores = (q @ k.transpose(2, 3)).float() * scaling
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    name = f"ruled_{id(rule)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model


def assert_generation_equals_the_rule(
    method: dict[str, Any],
    rule: Rule,
    *,
    tokens: int,
    padding: tuple[int, ...],
    new: int = 64,
    family: str = "llama",
    strict: bool = True,
    **model: Any,
) -> Any:
    """Logits and what is generated behind a left-padded prompt with grouped heads are the ruled model's, not the exact.

    Returns the compiled model.
    """
    eager, fast = compiled(family, options={"sparse_attention": method, "strict": strict}, **model)
    reference = ruled(build(family, **model), rule)
    inputs = prompt(len(padding), tokens, padding)
    with torch.no_grad():
        exact, expected, got = (one(**inputs).logits for one in (eager, reference, fast))
    for row, first in enumerate(padding):
        torch.testing.assert_close(got[row, first:], expected[row, first:], atol=5e-5, rtol=5e-5)
    # Of a model as small as these the likeliest tokens may be the same all the same.
    assert (exact - expected)[-1, padding[-1] :].abs().max() > 1e-2
    assert torch.equal(*(greedy(one, inputs, new) for one in (fast, reference)))
    assert set(phases(fast)) == {"prefill", "decode"}
    return fast


def assert_exact(method: dict[str, Any], *, tokens: int = 123, new: int = 12) -> None:
    """What a method generates that keeps everything is what the model itself generates."""
    eager, fast = compiled("llama", options={"sparse_attention": method, "strict": True})
    inputs = prompt(2, tokens, padding=(0, 21))
    assert torch.equal(greedy(fast, inputs, new), greedy(eager, inputs, new))
    assert not torchaccel.report(fast).declines
