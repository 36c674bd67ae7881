"""Rotary embedding moves into attention where that saves a launch, and generation stays what it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchaccel.kernels.cpp.compile import missing_toolchain
from torchaccel.passes.lowering.attention import AttentionLowering
from torchaccel.passes.lowering.lowered import Lowered
from torchaccel.passes.manager import PassManager

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, prompt
from tests.graph.capture import Captured, capture, capture_phase
from tests.models.families import CAUSAL, build
from torchaccel.options import resolve

if missing_toolchain() is not None:
    pytest.skip(str(missing_toolchain()), allow_module_level=True)

# More sequences than the fused kernels of few-row layers take, which would rotate themselves.
MANY = 9


def lowered(found: Captured, **options: Any) -> tuple[Lowered, Counter[str]]:
    """What lowering made of a graph, and how often it calls each attention operator."""
    module = found.copy()
    context, _ = PassManager(resolve(options).methods).run(module, torch.device("cpu"), "test")
    done = AttentionLowering(context, found.inputs, rotary=resolve(options).fusion).run()
    context.graph.lint()
    names = [n.target.name() for n in context.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return done, Counter(name.partition("::")[2] for name in names if name.startswith("torchaccel::"))


@pytest.mark.parametrize("family", CAUSAL)
def test_many_sequences_are_rotated_in_attention(family: str) -> None:
    done, calls = lowered(capture_phase(build(family, layers=2), "decode", batch=MANY))
    rotates = family not in ("gpt2", "opt")
    assert [site.rotary for site in done.sites] == [rotates] * 2 and not done.declines
    assert calls == {"attend_rotary" if rotates else "attend": 2}


@pytest.mark.parametrize(
    ("phase", "batch", "rotates"),
    [
        ("decode", 2, False),
        ("decode", MANY, True),
        ("decode", 33, False),
        ("extend", 1, True),
        ("extend", 12, False),
        ("static", 2, False),
    ],
)
def test_where_it_pays(phase: str, batch: int, rotates: bool) -> None:
    found = capture_phase(build("llama", layers=1), phase, batch=batch)
    assert [site.rotary for site in lowered(found)[0].sites] == [rotates]
    assert [site.rotary for site in lowered(found, fusion=False)[0].sites] == [False]


@pytest.mark.parametrize("options", [{"kv_compression": "int8"}, {"sparse_attention": "streaming_llm"}])
def test_methods_keep_it(options: dict[str, Any]) -> None:
    done, calls = lowered(capture_phase(build("llama", layers=2), "decode", batch=MANY), **options)
    assert all(site.rotary for site in done.sites) and calls == {"attend_rotary": 2}


def test_keys_that_are_turned_behind_it_keep_it_outside() -> None:
    done, calls = lowered(capture_phase(build("llama", layers=2), "extend"), kv_compression="turboquant")
    assert not any(site.rotary for site in done.sites) and calls == {"attend": 2}


class Attention(nn.Module):
    """One layer of attention over a cache, rotated as a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x * cos[:, None] + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin[:, None] for x in (q, k))  # type: ignore[return-value]

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (layer(x).view(x.shape[0], -1, 2, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.rotate(q, k, cos, sin)
        k, v = torch.cat([past_k, k], -2), torch.cat([past_v, v], -2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 2, k, v


class ReadTwice(Attention):
    """Somebody else reads the rotated queries."""

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        self.seen: list[Tensor] = []
        return (*super().forward(*args), self.seen[0].sum())

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate(q, k, cos, sin)
        self.seen.append(q)
        return q, k


class TwoAngles(Attention):
    """Queries and keys have tables of their own."""

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotate(q, k, cos, sin)[0], super().rotate(q, k, sin, cos)[1]


class WrittenLater(Attention):
    """The queries are changed in place once they are rotated."""

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        found = super().rotate(q, k, cos, sin)
        q.mul_(2.0)
        return found


class OnlyQueries(Attention):
    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotate(q, k, cos, sin)[0], k


@pytest.mark.parametrize(
    ("model", "rotates"),
    [(Attention, True), (ReadTwice, False), (TwoAngles, False), (WrittenLater, False), (OnlyQueries, False)],
)
def test_what_does_not_match_stays_as_it_was(model: type[Attention], rotates: bool) -> None:
    torch.manual_seed(0)
    past, tables = torch.randn(2, MANY, 2, 7, 16), torch.randn(2, MANY, 1, 16)
    (found,) = capture(model().eval(), torch.randn(MANY, 1, 32), *past, *tables)
    done, calls = lowered(found)
    assert [site.rotary for site in done.sites] == [rotates]
    assert calls == {"attend_rotary" if rotates else "attend": 1}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_greedy_tokens_are_those_of_eager(family: str) -> None:
    eager, fast = compiled(family, layers=2)
    inputs = prompt(MANY, 11, padding=tuple(row % 5 for row in range(MANY)))
    assert torch.equal(greedy(fast, inputs, 24), greedy(eager, inputs, 24))
    found = torchaccel.report(fast)
    assert all_lowered(fast) and found.recompiles == 0
    assert "2 x cpp rotary" in str(found)
    assert all(site["rotary"] for site in found.to_dict()["records"][-1]["sites"])


@pytest.mark.parametrize("options", [{"kv_compression": "int8"}, {"token_pruning": {"method": "fastv", "layer": 1}}])
def test_layouts_of_methods_hold_the_rotated_keys(options: dict[str, Any]) -> None:
    _, fast = compiled("llama", layers=2, options=options)
    _, outside = compiled("llama", layers=2, options={**options, "fusion": False})
    inputs = prompt(MANY, 80, padding=tuple(range(MANY)))
    assert torch.equal(greedy(fast, inputs, 24), greedy(outside, inputs, 24))
    rotary = [{site.rotary for site in torchaccel.report(model).records[-1].sites} for model in (fast, outside)]
    assert rotary == [{True}, {False}]
