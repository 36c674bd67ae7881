"""Expected Attention against masks over eager attention, the worked example, and rotations averaged one by one."""

import pytest
import torch
from torchaccel.passes.kv_compression.expected_attention import expectation, statistics

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.models.families import build
from tests.passes.kv_compression.masked_reference import Rule, grouped, marked, masked


class ExpectedRule(Rule):
    """Un-rotates the queries by the model's own tables, then rotates their mean and covariance to each future place."""

    def __init__(self, tokens, future, sinks, embedding, recent, value_norm):
        self.tokens, self.future, self.sinks, self.embedding = tokens, future, sinks, embedding
        self.recent, self.value_norm = recent, value_norm

    def turns(self, positions):
        """Rotation matrices ``[.., D, D]`` at positions ``[..]``."""
        cos, sin = self.embedding(torch.zeros(1), positions.reshape(1, -1))
        dim = cos.shape[-1]
        swap = torch.zeros(dim, dim)
        half = dim // 2
        swap[torch.arange(half), torch.arange(half) + half] = -1.0
        swap[torch.arange(half) + half, torch.arange(half)] = 1.0
        matrices = torch.diag_embed(cos[0]) + sin[0][..., None] * swap
        return matrices.view(*positions.shape, dim, dim)

    def prompt(self, layer, q, k, v, weights, valid):
        batch, _, tokens, dim = q.shape
        kept = []
        for row in range(batch):
            places = (valid[row].cumsum(-1) - 1).clamp(min=0)
            plain = torch.einsum("sji,hsj->hsi", self.turns(places), q[row])
            late = valid[row] & (valid[row].cumsum(-1) > self.sinks)
            x = plain[:, late]
            mean = x.mean(1)
            centred = x - mean[:, None]
            spread = centred.mT @ centred / x.shape[1]
            ahead = self.turns(places[-1] + 1 + torch.arange(self.future)).mean(0)
            mean, spread = mean @ ahead.T, ahead @ spread @ ahead.T
            keys = k[row].repeat_interleave(q.shape[1] // k.shape[1], 0)
            logits = torch.einsum("hsd,hd->hs", keys, mean) / dim**0.5
            logits = logits + torch.einsum("hsd,hde,hse->hs", keys, spread, keys) / (2 * dim)
            share = torch.softmax(logits.masked_fill(~late, -torch.inf), -1)
            score = grouped(share[None], k.shape[1])[0].mean(1)
            score = score * v[row].norm(dim=-1) if self.value_norm else score
            score = score.masked_fill(valid[row] & ~late, torch.inf).masked_fill(~valid[row], -torch.inf)
            score[:, tokens - self.recent :] = torch.inf
            kept.append(score.topk(self.tokens).indices)
        return marked(torch.stack(kept), tokens)


@pytest.mark.parametrize(
    ("own", "recent", "value_norm"), [({}, 12, False), ({"recent": 0, "value_norm": True}, 0, True)]
)
def test_generation_equals_the_masked_reference(own, recent, value_norm):
    method = {"method": "expected_attention", "tokens": 24, "future": 40, "sinks": 3, **own}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 60, padding=(0, 7))
    reference = masked(eager, ExpectedRule(24, 40, 3, build("llama").model.rotary_emb, recent, value_norm))
    assert torch.equal(greedy(fast, inputs, 30), greedy(reference, inputs, 30))
    assert phases(fast) == ["prefill", "decode"]


def test_models_without_rotary_embedding_have_it_too():
    eager, fast = compiled("gpt2", options={"kv_compression": {"method": "expected_attention", "tokens": 24}})
    inputs = prompt(1, 40)
    first = greedy(fast, inputs, 1)
    assert torch.equal(first, greedy(eager, inputs, 1)) and greedy(fast, inputs, 5).shape == (1, 45)


def test_worked_example():
    mean, spread = torch.tensor([[[1.0, 0.0]]]), torch.diag(torch.tensor([1.0, 4.0]))[None, None]
    keys = torch.tensor([[[[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])
    every = torch.ones(1, 3, dtype=torch.bool)
    got = expectation(mean, spread, keys, 2**-0.5, every)
    torch.testing.assert_close(got, torch.tensor([[[0.15346, 0.74938, 0.09716]]]), atol=1e-4, rtol=0)
    plain = expectation(mean, torch.zeros_like(spread), keys, 2**-0.5, every)
    torch.testing.assert_close(plain, torch.tensor([[[0.576, 0.140, 0.284]]]), atol=1e-3, rtol=0)


def test_statistics_leave_padding_out():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 4)
    counted = torch.tensor([[False] * 3 + [True] * 6])
    mean, spread = statistics(x, counted)
    torch.testing.assert_close(mean, x[:, :, 3:].mean(2))
    torch.testing.assert_close(spread[0, 1], torch.cov(x[0, 1, 3:].T, correction=0))
