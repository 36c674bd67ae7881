"""Fusing few-row layers: what is grouped, what is legal, what is chosen, and what comes out."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torchaccel.kernels.cpp.compile import missing_toolchain
from torchaccel.passes.base import Fuel, RewriteContext
from torchaccel.passes.fusion import atoms, fuse_rows, groups, plan
from torchaccel.passes.fusion.legality import Legality

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt
from tests.graph.capture import Captured, capture
from torchaccel.graph.anatomy import analyze

if missing_toolchain() is not None:
    pytest.skip(str(missing_toolchain()), allow_module_level=True)


class Block(nn.Module):
    """Norm, gated MLP and residual."""

    def __init__(self, dim: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate, self.up = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LeavesAndReturns(nn.Module):
    """From one layer to the next there is a way through an operator that no kernel knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + torch.cumsum(y, -1))


class Written(nn.Module):
    """What the layers read is written in place later on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(x, -1)
        y = self.second(F.relu(self.first(x)))
        return y + x.mul_(2.0)


class TwoRowCounts(nn.Module):
    """Two layers of one chain with different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)).view(-1, 4))


def captured(model: nn.Module, *shape: int) -> Captured:
    torch.manual_seed(0)
    (found,) = capture(model.eval(), torch.randn(shape))
    return found


def fused(found: Captured, rates: plan.Rates | None = None) -> tuple[GraphModule, fuse_rows.FuseRows, Any]:
    module = found.copy()
    context = RewriteContext(module.graph, module, torch.device("cpu"), Fuel(None), analyze(module))
    step = fuse_rows.FuseRows(rates or plan.Rates())
    result = step.apply(context)
    module.graph.lint()
    module.recompile()
    return module, step, result


def calls(module: GraphModule, target: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def problem(model: nn.Module, *shape: int) -> str | None:
    """The rule that the run of all atoms of a model breaks, whatever chain they are in."""
    graph = captured(model, *shape).copy().graph
    everything = atoms.find_atoms(graph)
    (whole,) = [run for run in groups.runs(everything) if run.size == len(everything)]
    return Legality(graph, "cpu").problem(whole)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_block_becomes_one_kernel(rows: int) -> None:
    found = captured(Block(), 1, rows, 32)
    module, step, result = fused(found)
    assert calls(module, torch.ops.torchaccel.fused_rows.default) == 1
    assert calls(module, torch._C._nn.linear) == 0
    torch.testing.assert_close(found.run(module), found.outputs, atol=1e-5, rtol=1e-5)
    (group,) = step.groups
    assert result.sites == [group.site]
    assert group.kernel == "norm, linear, silu, linear, multiply, linear, add"
    # Two loops around three layers (two of them on one input) become one launch.
    assert group.saved_launches == 4
    # Written and read again without it: both halves, their product, the norm and the last projection.
    assert group.saved_bytes == 2 * 4 * rows * (3 * 48 + 2 * 32)
    assert group.lost and all(saved <= group.saved_microseconds for _, saved in group.lost)


def test_more_rows_are_left_to_stock_products() -> None:
    module, step, _ = fused(captured(Block(), 1, 9, 32))
    assert not step.groups and calls(module, torch._C._nn.linear) == 3


def test_what_saves_no_time_is_left_alone() -> None:
    free = plan.Rates(bytes_per_second=1e30, operator_seconds=0.0, fork_seconds=1e-6, loop_seconds=0.0)
    module, step, _ = fused(captured(Block(), 1, 1, 32), free)
    assert not step.groups and calls(module, torch._C._nn.linear) == 3


def test_a_group_is_convex() -> None:
    assert problem(LeavesAndReturns(), 1, 8) == "not convex"
    found = captured(LeavesAndReturns(), 1, 8)
    module, _, _ = fused(found)
    torch.testing.assert_close(found.run(module), found.outputs, atol=1e-6, rtol=1e-6)


def test_what_is_written_in_place_is_not_read_by_a_group() -> None:
    assert problem(Written(), 1, 8) == "not pure"
    found = captured(Written(), 1, 8)
    module, step, _ = fused(found)
    assert not any(group.linears == 2 for group in step.groups)
    torch.testing.assert_close(found.run(module), found.outputs, atol=1e-6, rtol=1e-6)


def test_the_layers_of_a_group_have_the_same_rows() -> None:
    assert problem(TwoRowCounts(), 2, 8) == "not uniform"


def test_a_value_that_others_read_is_returned() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.norm(x)
            return self.down(F.silu(self.gate(h)) * self.up(h)), torch.cumsum(h[..., None], 1)

    found = captured(Twice(), 2, 32)
    module, step, _ = fused(found)
    assert len(step.groups) == 1
    torch.testing.assert_close(found.run(module), found.outputs, atol=1e-5, rtol=1e-5)


def test_the_choice_is_the_best_of_all() -> None:
    """Against every way to cut a chain of seven into runs."""
    draw = random.Random(0)
    for _ in range(20):
        options = []
        for start, end in itertools.combinations(range(8), 2):
            if end - start > 1 and draw.random() < 0.7:
                group = groups.Group((None,) * (end - start), start, {}, frozenset())  # type: ignore[arg-type]
                options.append(plan.Candidate(group, 0, 0, draw.uniform(-1, 3)))
        options = [option for option in options if option.saved_seconds > 0]
        best = 0.0
        for count in range(4):
            for some in itertools.combinations(options, count):
                if not any(plan._overlap(a, b) for a, b in itertools.combinations(some, 2)):
                    best = max(best, sum(option.saved_seconds for option in some))
        chosen = plan.best_runs(7, options)
        assert sum(one.candidate.saved_seconds for one in chosen) == pytest.approx(best)
        assert all(one.candidate not in one.lost for one in chosen)


# Between two attentions everything is one kernel, and so is what is before the first and after the last.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_a_layer_of_a_decode_step_is_one_launch(family: str) -> None:
    eager, fast = compiled(family)
    inputs = prompt(1, 11)
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))
    (record,) = [record for record in torchaccel.report(fast).records if record.phase == "decode"]
    # GPT-NeoX's MLP stands beside its attention: the last layer's runs before the last attention too.
    assert len(record.groups) == len(record.sites) + 1 + (family == "gpt_neox")
    assert sum(group.linears for group in record.groups) == record.linear_layers
    shown = str(torchaccel.report(fast))
    assert "fusion, decode" in shown and torchaccel.report(fast).to_dict()["records"][-1]["groups"]


def test_it_can_be_switched_off() -> None:
    eager, fast = compiled("llama", layers=1, options={"fusion": False})
    assert torch.equal(greedy(fast, prompt(1, 9), 4), greedy(eager, prompt(1, 9), 4))
    found = torchaccel.report(fast)
    assert found.requested == {"fusion": False} and not any(record.groups for record in found.records)
    assert found.records[-1].linear_layers == 8


def test_a_failed_fusion_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite, done = fuse_rows.rewrite_group, []

    def fail(*args: Any) -> None:
        if done:
            raise RuntimeError("halfway")
        done.append(rewrite(*args))

    monkeypatch.setattr(fuse_rows, "rewrite_group", fail)
    eager, fast = compiled("llama", layers=1)
    with pytest.warns(UserWarning, match="fuse_rows failed .* halfway"):
        got = greedy(fast, prompt(1, 11), 4)
    assert torch.equal(got, greedy(eager, prompt(1, 11), 4))
    record = torchaccel.report(fast).records[-1]
    assert not record.groups and record.linear_layers == 8 and record.declined is None


def test_a_gpu_keeps_inductors_fusion_until_rates_say_otherwise() -> None:
    found = captured(Block(), 1, 12, 32)  # more rows than the C++ kernels take
    results = []
    for rates in (None, plan.Rates()):
        module = found.copy()
        step = fuse_rows.FuseRows(rates)
        context = RewriteContext(module.graph, module, torch.device("cuda"), Fuel(None), analyze(module))
        results.append((step.apply(context), calls(module, torch.ops.torchaccel.fused_rows.default)))
    (kept, none), (rewritten, one) = results
    assert none == 0 and not kept.sites and "cuda" in kept.detail and "Inductor" in kept.detail
    assert one == 1 and len(rewritten.sites) == 1
