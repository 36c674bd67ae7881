"""Gathers of the kept tokens: what is grouped, what is legal, what pays, and that not a bit changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torchaccel.kernels.cpp.compile import missing_toolchain
from torchaccel.kernels.gather_spec import TokenItem
from torchaccel.passes.base import Fuel, RewriteContext
from torchaccel.passes.fusion import fuse_gathers, gathers, plan
from torchaccel.passes.fusion.legality import Legality
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, prompt
from tests.graph.capture import Captured, capture
from torchaccel.backend import Backend
from torchaccel.graph.anatomy import analyze

if missing_toolchain() is not None:
    pytest.skip(str(missing_toolchain()), allow_module_level=True)

# A call costs nothing here, so that whatever is legal and not Inductor's own business is fused.
FREE = plan.Rates(operator_seconds=0.0, fork_seconds=0.0)


def take(x: Tensor, keep: Tensor, *dims: int) -> Tensor:
    """As ``narrow_sequence`` writes it, for a batch of several rows."""
    for dim in dims:
        index = [None] * x.dim()
        index[0] = index[dim] = slice(None)
        x = torch.take_along_dim(x, keep[tuple(index)], dim=dim)
    return x


def kept(batch: int, tokens: int, count: int) -> Tensor:
    return torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(batch)])


def tensors(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a rotary table, and a mask."""
    return torch.randn(batch, tokens, 6), torch.randn(1, tokens, 42), torch.rand(batch, 1, tokens, tokens) > 0.5


def three(hidden: Tensor, table: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return take(hidden, keep, 1), take(table, keep, 1), take(mask, keep, 2, 3)


def captured(function: Any, *args: Any, dynamic: bool = False) -> Captured:
    (found,) = capture(function, *args, dynamic=dynamic)
    return found


def fused(found: Captured, rates: plan.Rates | None = FREE) -> tuple[GraphModule, fuse_gathers.FuseGathers, Any]:
    module = found.copy()
    context = RewriteContext(module.graph, module, torch.device("cpu"), Fuel(None), analyze(module))
    step = fuse_gathers.FuseGathers(rates)
    result = step.apply(context)
    module.graph.lint()
    module.recompile()
    return module, step, result


def calls(module: GraphModule, target: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def problem(function: Any, *args: Any) -> str | None:
    """The rule that the run of all gathers of a function breaks."""
    graph = captured(function, *args).copy().graph
    (found,) = gathers.find_gathers(graph)
    (whole,) = [run for run in gathers.runs(found) if run.size == len(found)]
    return gathers.problem(whole, Legality(graph, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_gathers_by_one_index_become_one_kernel(batch: int, dynamic: bool) -> None:
    found = captured(three, *tensors(batch, 42), kept(batch, 42, 17), dynamic=dynamic)
    module, step, result = fused(found)
    assert calls(module, torch.ops.torchaccel.gather_tokens.default) == 1
    assert calls(module, torch.take_along_dim) == 0
    assert all(torch.equal(a, b) for a, b in zip(found.run(module), found.outputs, strict=True))
    (group,) = step.groups
    assert result.sites == [group.site] and group.kernel.startswith("gather ") and group.kernel.count(", ") == 2
    # Three shapes are three loops without it, each of which reads the index.
    assert group.saved_launches == 2 and group.saved_bytes == 2 * 8 * batch * 17


def test_rows_and_columns_of_a_mask_are_one_item() -> None:
    graph = captured(three, *tensors(2, 42), kept(2, 42, 17)).copy().graph
    (found,) = gathers.find_gathers(graph)
    assert [gather.item for gather in found] == [TokenItem(1, 4), TokenItem(1, 4), TokenItem(2, 1, True)]


def test_a_row_of_one_prompt_is_told_from_one_of_several() -> None:
    """``keep[0]`` is all tokens of a batch of one, and one row's of a batch of two."""

    def function(x: Tensor, y: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return torch.take_along_dim(x, keep[0, :, None], dim=0), torch.take_along_dim(y, keep[0, None, :], dim=1)

    for batch, groups in ((1, 1), (2, 0)):
        found = captured(function, torch.randn(42, 6), torch.randn(1, 42), kept(batch, 42, 5))
        module, step, _ = fused(found)
        assert len(step.groups) == groups
        assert all(torch.equal(a, b) for a, b in zip(found.run(module), found.outputs, strict=True))


def test_two_indexes_are_two_groups() -> None:
    def function(x: Tensor, y: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return take(x, first, 1), take(y, first, 1), take(x, second, 1), take(y, second, 1)

    hidden, table, _ = tensors(2, 42)
    found = captured(function, hidden, table, kept(2, 42, 17), kept(2, 42, 6))
    module, step, _ = fused(found)
    assert len(step.groups) == 2 and calls(module, torch.take_along_dim) == 0
    assert all(torch.equal(a, b) for a, b in zip(found.run(module), found.outputs, strict=True))


def test_what_is_read_before_all_is_there_stays() -> None:
    def function(x: Tensor, keep: Tensor) -> Tensor:
        first = take(x, keep, 1)
        return take(torch.cumsum(x, 1) + first.sum(), keep, 1)

    x, _, _ = tensors(2, 42)
    assert problem(function, x, kept(2, 42, 17)) == "not schedulable"
    found = captured(function, x, kept(2, 42, 17))
    module, step, _ = fused(found)
    assert not step.groups and torch.equal(found.run(module)[0], found.outputs[0])


def test_what_is_written_in_place_stays() -> None:
    def function(x: Tensor, y: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cumsum(x, 1)
        return take(x, keep, 1), take(y, keep, 1), x.mul_(2.0)

    hidden, table, _ = tensors(2, 42)
    assert problem(function, hidden, table, kept(2, 42, 17)) == "not pure"


def test_a_residual_that_only_the_gather_reads_is_inductors() -> None:
    """It is summed for the kept tokens only, in the loop of the norm that follows; a group would write all of it."""

    def function(x: Tensor, y: Tensor, table: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        return take(table, keep, 1), take(mask, keep, 2, 3), take(x + y, keep, 1)

    hidden, table, mask = tensors(2, 42)
    found = captured(function, hidden, hidden, table, mask, kept(2, 42, 17))
    module, step, _ = fused(found)
    (group,) = step.groups
    assert calls(module, torch.take_along_dim) == 1 and group.kernel.count(", ") == 1
    assert group.lost[0][0].endswith(", add") and group.lost[0][1] < group.saved_microseconds
    assert all(torch.equal(a, b) for a, b in zip(found.run(module), found.outputs, strict=True))


def test_what_saves_no_time_is_inductors() -> None:
    found = captured(three, *tensors(1, 42), kept(1, 42, 17))
    module, step, result = fused(found, plan.Rates(operator_seconds=1.0))
    assert not step.groups and calls(module, torch.take_along_dim) == 4
    assert "left to Inductor" in result.detail
    _, step, result = fused(found, None)
    assert not step.groups and "nothing measured" in result.detail


@pytest.mark.parametrize(("padding", "lengths"), [((), (41,)), ((0, 8), (41, 42, 123))])
def test_a_pruned_prompt_has_the_same_bits(
    padding: tuple[int, ...], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastV's prompt with its gathers in one kernel and without: no graph more for it, and every bit as it was.

    Inductor rounds what stands around them in another way by one ulp (it computes the tables where it gathers them, or
    before), so the padded prompts, whose masks are gathered, run as the graph is written.
    """
    if padding:
        monkeypatch.setattr(Backend, "_compiler", lambda *_: lambda module, examples: module.forward)
    options = {"token_pruning": {"method": "fastv", "keep": 0.5, "layer": 2}}
    results, graphs = [], []
    for rates in (None, FREE):
        monkeypatch.setattr(Backend, "_rates", lambda *_, rates=rates: rates)
        torch._dynamo.reset()
        _, fast = compiled("llama", layers=3, options=options)
        found = []
        for length in lengths:
            inputs = prompt(len(padding) or 1, length, padding=padding, seed=length)
            if not padding:
                del inputs["attention_mask"]
            cache = DynamicCache(config=fast.config)
            with torch.no_grad():
                logits = fast(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            stored = [layer.keys for layer in cache.layers]
            found += [logits, *(keys.buf[:, :, keys.start : keys.end].clone() for keys in stored)]
        results.append(found)
        report = torchaccel.report(fast)
        grouped = [group for record in report.records for group in record.groups if group.kernel.startswith("gather")]
        assert bool(grouped) == (rates is not None)
        graphs.append(len(report.records))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0 if padding else 1e-6, rtol=0 if padding else 1e-6)
    assert graphs[0] == graphs[1]
    assert "gather" in str(report) and f"fusion, {report.records[-1].phase}" in str(report)
