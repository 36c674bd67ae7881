"""A method for prompts as a mask over eager attention, written from its publication with plain tensors and loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.e2e.generation import compiled, greedy, prompt
from tests.models.families import build

# Of one head: q, k [S, D], the first live token, the scale -> which blocks of keys blocks of queries read, [N, N].
Rule = Callable[[Tensor, Tensor, int, float], Tensor]


def masked(model: Any, rule: Rule, block: int) -> Any:
    """``model`` (in place) whose prompts read only what ``rule`` lists for every query head; later tokens read all."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group, tokens = q.shape[1] // k.shape[1], k.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.transpose(2, 3)).float() * scaling
        hidden = torch.ones(q.shape[2], tokens).triu(tokens - q.shape[2] + 1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
        if mask is not None:
            scores = scores + mask[..., :tokens].float()
        if q.shape[2] == tokens:
            for b in range(q.shape[0]):
                first = 0 if mask is None else int((mask[b, 0, -1] == 0).int().argmax())
                for h in range(q.shape[1]):
                    read = rule(q[b, h].float(), k[b, h].float(), first, scaling)
                    wide = read.repeat_interleave(block, 0).repeat_interleave(block, 1)[:tokens, :tokens]
                    scores[b, h].masked_fill_(~wide, -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0)
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    name = f"masked_prompt_{id(rule)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model


def assert_equal_to_the_masked_model(options: dict[str, Any], rule: Rule, block: int, tokens: int = 300) -> Any:
    """Logits of a left-padded batch with grouped heads, and what is generated, are those of the masked model.

    Returns the compiled model; the mask must matter, or nothing was tested.
    """
    eager, fast = compiled("llama", options={"sparse_attention": options})
    reference = masked(build("llama"), rule, block)
    inputs = prompt(2, tokens, padding=(0, 75))
    with torch.no_grad():
        expected, got, exact = (model(**inputs).logits for model in (reference, fast, eager))
    for row, first in enumerate((0, 75)):
        torch.testing.assert_close(got[row, first:], expected[row, first:], atol=3e-5, rtol=3e-5)
        assert (expected[row, first:] - exact[row, first:]).abs().max() > 1e-3
    assert torch.equal(greedy(fast, inputs, 6), greedy(reference, inputs, 6))
    return fast


def assert_exact_when_everything_is_read(options: dict[str, Any], tokens: int = 300) -> None:
    """What is generated is what the model itself generates."""
    eager, fast = compiled("llama", options={"sparse_attention": options})
    inputs = prompt(2, tokens, padding=(0, 75))
    assert torch.equal(greedy(fast, inputs, 4), greedy(eager, inputs, 4))


def causal_weights(q: Tensor, k: Tensor, first: int, scale: float, rows: list[int]) -> Tensor:
    """Attention weights of some rows of one head, ``[R, S]``."""
    found = torch.zeros(len(rows), k.shape[0])
    for i, t in enumerate(rows):
        if t >= first:
            found[i, first : t + 1] = torch.softmax(q[t] @ k[first : t + 1].T * scale, -1)
    return found


def from_lines(columns: set[int], diagonals: set[int], first: int, blocks: int, block: int) -> Tensor:
    """Blocks that block columns and block diagonals, and the own block, reach: bool ``[N, N]``."""
    read = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(first // block, blocks):
        for j in range(first // block, i + 1):
            read[i, j] = j in columns or i - j in diagonals or i == j
    return read
