"""InfLLM v2: prompts and steps equal to masked models whose rule is written from the publication."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchaccel.kernels.prompt_selectors.semantic import SemanticBlocks
from torchaccel.kernels.semantic_blocks import semantic_blocks
from torchaccel.kernels.spec import AttentionSpec, KVFormat

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, prompt
from tests.passes.listed_reference import Lister, listing
from tests.passes.sparse_attention.prompt_reference import assert_exact_when_everything_is_read
from torchaccel.errors import OptionsError
from torchaccel.options import resolve

BLOCKS, WINDOW, INIT = 2, 64, 1
OPTIONS = {"method": "infllm_v2", "blocks": BLOCKS, "window": WINDOW, "init_blocks": INIT, "dense_len": 0}


def window_weights(q: Tensor, k: Tensor, first: int, t: int, scale: float) -> dict[int, float]:
    """What query ``q [D]`` at slot t gives windows of 32 keys, one every 16, all of them live and not after t."""
    starts = [i for i in range(0, t + 1, 16) if i >= first and i + 32 <= t + 1]
    if not starts:
        return {}
    scores = torch.stack([k[i : i + 32].float().mean(0) @ q.float() * scale for i in starts])
    return dict(zip(starts, scores.softmax(0).tolist(), strict=True))


def best_blocks(given: dict[int, float], own: int, first: int) -> set[int]:
    """Blocks of 64: the first ones, the own one and those in the window before, and the best of the others."""
    start, local = first // 64, WINDOW // 64
    forced = {*range(start, min(start + INIT, own + 1)), *range(max(start, own - local), own + 1)}

    def relevance(block: int) -> float:
        # A window touches the block where it starts at most 16 keys before it.
        return max((given.get(block * 64 + 16 * i, 0.0) for i in range(-1, 4)), default=0.0)

    others = sorted(set(range(start, own + 1)) - forced, key=relevance, reverse=True)
    return forced | set(others[: BLOCKS + local - len(forced)])


def prompt_blocks(q: Tensor, k: Tensor, first: int, scale: float) -> list[set[int]]:
    """Of the query heads ``q [G, S, D]`` of one KV head, by block of queries."""
    found = []
    for block in range(-(-q.shape[1] // 64)):
        given: dict[int, float] = {}
        for t in range(max(first, block * 64), min(q.shape[1], block * 64 + 64)):
            for head in q:
                for start, weight in window_weights(head[t], k, first, t, scale).items():
                    given[start] = given.get(start, 0.0) + weight
        found.append(best_blocks(given, block, first) if block >= first // 64 else set())
    return found


@pytest.mark.parametrize(
    ("dtype", "tokens", "padding"), [("float32", 460, 0), ("bfloat16", 331, 75), ("float32", 20, 0)]
)
def test_lists_of_a_prompt_are_those_of_a_loop(dtype: str, tokens: int, padding: int) -> None:
    dense = KVFormat("dense", dtype, 42)
    spec = AttentionSpec("prefill", 42, 2, dtype, dense, dense, 0.3, causal=True)
    torch.manual_seed(tokens)
    q, k = (torch.randn(1, tokens, n, 42).to(getattr(torch, dtype)).transpose(1, 2) for n in (4, 2))
    q[:, :, :padding], k[:, :, :padding] = torch.nan, torch.nan
    selector = SemanticBlocks(64, BLOCKS + 1, 1, INIT, dense=0)
    found = selector.select(spec, q, k, torch.tensor([padding]) if padding else None)
    assert found.shape == (1, 4, -(-tokens // 64), 3) and found.dtype == torch.int32
    for head in range(4):
        group = q[0, head // 2 * 2 : head // 2 * 2 + 2]
        for row, expected in zip(
            found[0, head].tolist(), prompt_blocks(group, k[0, head // 2], padding, 0.3), strict=True
        ):
            assert row == [*sorted(expected), *[-1] * 3][:3]


def test_maximum_over_windows_example() -> None:
    """192 tokens: the windows of the blocks weigh .20, .30 and .30."""
    weights = torch.tensor([0.10, 0.02, 0.03, 0.20, 0.05, 0.01, 0.04, 0.30, 0.02, 0.08, 0.15])[None, None, None]
    begin = torch.tensor([0])
    assert semantic_blocks(weights, torch.tensor([2]), begin, 4, 2, 0, 0).tolist() == [[[[1, 2]]]]
    weights[..., 7] = 0.0
    assert semantic_blocks(weights, torch.tensor([2]), begin, 4, 2, 0, 0).tolist() == [[[[0, 2]]]]
    assert semantic_blocks(weights[..., :0], torch.tensor([0]), begin, 4, 2, 1, 1).tolist() == [[[[0, -1]]]]


class Rule(Lister):
    def step(self, layer: int, q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        batch, kv_heads, tokens, dim = k.shape
        seen = torch.zeros(batch, kv_heads, tokens, dtype=torch.bool)
        for b in range(batch):
            first = int(valid[b].int().argmax())
            for h in range(kv_heads):
                given: dict[int, float] = {}
                for head in q[b].unflatten(0, (kv_heads, -1))[h]:
                    for start, weight in window_weights(head[0], k[b, h], first, tokens - 1, dim**-0.5).items():
                        given[start] = given.get(start, 0.0) + weight
                for block in best_blocks(given, (tokens - 1) // 64, first):
                    seen[b, h, block * 64 : block * 64 + 64] = True
        return seen


def test_steps_equal_the_masked_model() -> None:
    options = {"sparse_attention": {"decode": OPTIONS}, "strict": True}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(2, 300, padding=(0, 75))
    exact = greedy(eager, inputs, 64)
    found = greedy(listing(eager, Rule()), inputs, 64)
    assert torch.equal(greedy(fast, inputs, 64), found) and not torch.equal(found, exact)
    assert all_lowered(fast)


def test_generation_after_a_sparse_prompt() -> None:
    eager, fast = compiled("llama", options={"sparse_attention": OPTIONS, "strict": True})
    inputs = prompt(2, 400, padding=(0, 75))
    exact, found = greedy(eager, inputs, 64), greedy(fast, inputs, 64)
    assert found.shape == exact.shape and not torch.equal(found, exact)
    assert torchaccel.report(fast).density < 1 and not torchaccel.report(fast).declines


def test_exact_when_every_block_is_read() -> None:
    assert_exact_when_everything_is_read({**OPTIONS, "blocks": 64})


def test_later_tokens_change_nothing_before_them() -> None:
    dense = KVFormat("dense", "float32", 16)
    spec = AttentionSpec("prefill", 16, 1, "float32", dense, dense, 0.3, causal=True)
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 512, 16) for _ in range(2))
    later = torch.arange(512)[:, None] >= 256
    selector = SemanticBlocks(64, 3, 0, 1, dense=0)
    changed = selector.select(spec, *(torch.where(later, x.flip(2) * 3, x) for x in (q, k)), None)
    assert torch.equal(selector.select(spec, q, k, None)[:, :, :4], changed[:, :, :4])


def test_options_without_room_say_so() -> None:
    with pytest.raises(OptionsError, match="no room for init_blocks=3"):
        resolve({"sparse_attention": {"method": "infllm_v2", "blocks": 3, "init_blocks": 3}})
