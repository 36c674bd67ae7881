"""The tokens of most attention: C++ and stock operators against a sort, a row at a time."""

import pytest
import torch
from torchaccel.kernels import registry, top_tokens


@pytest.mark.parametrize("run", [registry.top_tokens("cpu"), top_tokens.top_tokens], ids=["cpp", "torch"])
@pytest.mark.parametrize(
    ("slots", "tokens", "count"), [(123, 123, 42), (64, 42, 6), (50, 6, 42), (5000, 4999, 311), (9, 9, 0)]
)
def test_the_highest_ascending(run, slots, tokens, count):
    mass = torch.randn(2, 3, slots).mul(4).exp()
    mass[..., tokens:] = torch.nan
    found = run(mass, tokens, count)
    for b, h in torch.ones(2, 3).nonzero().tolist():
        best = sorted(range(tokens), key=lambda i: -float(mass[b, h, i]))[:count]
        assert found[b, h].tolist() == sorted(best) + [-1] * (count - len(best))


@pytest.mark.parametrize("run", [registry.top_tokens("cpu"), top_tokens.top_tokens], ids=["cpp", "torch"])
def test_zeros_equals_and_nan(run):
    mass = torch.zeros(1, 1, 70)
    mass[0, 0, [3, 40, 41]] = torch.tensor([1e-38, torch.nan, 1.0])
    assert run(mass, 60, 3).tolist() == [[[3, 40, 41]]]
    assert sorted(set(run(mass, 60, 42).flatten().tolist())) == run(mass, 60, 42).flatten().tolist()


def test_a_layer_chooses_what_the_next_one_reads():
    """Logits (1, 5, 2, 0, 4, 3 of the newest token), three tokens in all: the next layer misses its own best one."""
    mass = torch.softmax(torch.tensor([1.0, 5, 2, 0, 4, 3]), -1)[None, None]
    assert top_tokens.top_tokens(mass, 5, 2).tolist() == [[[1, 4]]]
    own = torch.tensor([0.0, 1, 9, 0, 2, 1])
    listed = torch.full((6,), -torch.inf).scatter(0, torch.tensor([1, 4, 5]), own[[1, 4, 5]])
    torch.testing.assert_close(
        torch.softmax(listed, -1)[[1, 4, 5]], torch.tensor([0.2119, 0.5761, 0.2119]), atol=1e-4, rtol=0
    )
