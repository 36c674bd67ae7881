"""Rotary embeddings: every spelling is found, says what it computes, and what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torchaccel.kernels import rotary
from torchaccel.passes.canonicalize.attention import canonicalize_attention
from torchaccel.passes.dead_code import remove_dead_code
from torchaccel.passes.lowering.rotary import find_rotary

from tests.graph.capture import Captured, capture, capture_phase
from tests.kernels.cpp_support.cases import spec
from tests.models.families import CAUSAL, build
from torchaccel.graph.anatomy import analyze
from torchaccel.graph.nodes import output_nodes
from torchaccel.graph.rotary import rotation_of

ROTATED_CHANNELS = {"gpt_neox": 4, "gpt2": 0, "opt": 0}
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def chunks(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def splits(x: Tensor) -> Tensor:
    a, b = x.split(x.shape[-1] // 2, -1)
    return torch.cat([-b, a], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    return torch.cat([(turned * cos) + (halves(turned) * sin), rest], dim=-1)


def upcast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos + pairs(wide) * sin).to(dtype=x.dtype)


SPELLINGS: dict[str, tuple[Spelling, str, int]] = {
    "halves": (lambda x, cos, sin: x * cos + halves(x) * sin, "half", 16),
    "chunks": (lambda x, cos, sin: x * cos + chunks(x) * sin, "half", 16),
    "splits": (lambda x, cos, sin: sin * splits(x) + cos * x, "half", 16),
    "pairs": (lambda x, cos, sin: x * cos + pairs(x) * sin, "interleaved", 16),
    "partial": (partial, "half", 6),
    "partial_of_all": (partial, "half", 16),
    "upcast": (upcast, "interleaved", 16),
}
LOOK_ALIKES: dict[str, tuple[Spelling, int]] = {
    "the wrong half is negative": (lambda x, cos, sin: x * cos + torch.cat((x[..., 8:], -x[..., :8]), -1) * sin, 16),
    "halves in order": (lambda x, cos, sin: x * cos + torch.cat((-x[..., :8], x[..., 8:]), -1) * sin, 16),
    "of two tensors": (lambda x, cos, sin: x * cos + halves(x + 1) * sin, 16),
    "unequal parts": (lambda x, cos, sin: x * cos + torch.cat((-x[..., 6:], x[..., :6]), -1) * sin, 16),
    "another dimension": (lambda x, cos, sin: x * cos + torch.cat((-x[..., 8:, :], x[..., :8, :]), -2) * sin, 16),
    "a difference": (lambda x, cos, sin: x * cos - halves(x) * sin, 16),
    "a channel is missing": (
        lambda x, cos, sin: torch.cat((x[..., :6] * cos + halves(x[..., :6]) * sin, x[..., 7:]), -1), 6
    ),
    "the last channels": (
        lambda x, cos, sin: torch.cat((x[..., 10:] * cos + halves(x[..., 10:]) * sin, x[..., :10]), -1), 6
    ),
}  # fmt: skip


class Spelt(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.spelling(x, cos[:, None], sin[:, None])


def spelt(spelling: Spelling, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Captured, Node]:
    torch.manual_seed(0)
    cos, sin = torch.randn(2, 2, 16, dim).to(dtype)
    (found,) = capture(Spelt(spelling), torch.randn(2, 3, 16, 16).to(dtype), cos, sin)
    return found, output_nodes(found.module.graph)[0]


def values_of(found: Captured, module: Any) -> dict[Node, Any]:
    """Value of every node in a run on the recorded inputs."""

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    values: dict[Node, Any] = {}
    with torch.no_grad():
        Recorder(module).run(*found.inputs)
    return values


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_found_and_says_what_it_computes(name: str) -> None:
    spelling, style, dim = SPELLINGS[name]
    found, output = spelt(spelling, dim)
    got = rotation_of(output)
    assert got is not None and (got.style, got.dim) == (style, dim) and got.x.op == "placeholder"
    values = values_of(found, found.module)
    case = spec("float32", 16, 1, rotary=style, rotary_dim=dim)
    tables = (values[table][:, 0] for table in (got.cos, got.sin))
    assert torch.equal(rotary.rotated(case, values[got.x], *tables), values[output])
    assert all(user in got.nodes for node in got.nodes - {output} for user in node.users)


def test_in_bfloat16_the_upcast_one_is_rounded_once() -> None:
    found, output = spelt(upcast, 16, torch.bfloat16)
    got = rotation_of(output)
    assert got is not None and got.x.op == "placeholder"
    values = values_of(found, found.module)
    case = spec("bfloat16", 16, 1, rotary="interleaved", rotary_dim=16)
    tables = (values[table][:, 0] for table in (got.cos, got.sin))
    assert torch.equal(rotary.rotated(case, values[got.x], *tables), values[output])


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_looks_alike_is_none(name: str) -> None:
    spelling, dim = LOOK_ALIKES[name]
    assert rotation_of(spelt(spelling, dim)[1]) is None


@pytest.mark.parametrize("phase", ["decode", "extend"])
@pytest.mark.parametrize("family", CAUSAL)
def test_attention_of_every_family(family: str, phase: str) -> None:
    """Queries and new keys, rotated by what was found, are what the model attends with."""
    found = capture_phase(build(family, layers=2), phase)
    module = found.copy()
    remove_dead_code(module.graph)
    canonicalize_attention(module.graph)
    module.recompile()
    values = values_of(found, module)
    sites = analyze(module).attentions
    assert len(sites) == 2
    for site in sites:
        got, dim = find_rotary(site), ROTATED_CHANNELS.get(family, 16)
        assert (got is None) == (dim == 0)
        if got is None:
            continue
        case = spec("float32", 16, 1, rotary=got.style, rotary_dim=dim)
        tables = values[got.cos], values[got.sin]
        assert got.dim == dim and tables[0].dim() == 3
        for before, after in ((got.q, site.q), (got.k_new, site.key_cache.new)):
            assert torch.equal(rotary.rotated(case, values[before], *tables), values[after])
