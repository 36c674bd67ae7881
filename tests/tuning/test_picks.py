"""From what was measured to the operators of a graph that carry it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.fx import Graph, Node
from torchaccel.kernels import ops
from torchaccel.kernels.candidates import Candidate, Spec
from torchaccel.kernels.fused_spec import FusedSpec
from torchaccel.kernels.pick import Pick
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.selection_spec import SelectionSpec, SummarySpec
from torchaccel.kernels.shared_prefix import specs
from torchaccel.kernels.spec import LinearSpec

from tests.kernels.fused_cases import CASES
from tests.tuning.support import DECODE, MACHINE, elsewhere, failure, timing
from torchaccel.errors import CacheMissError
from torchaccel.tuning.key import Key
from torchaccel.tuning.picks import pick_kernels
from torchaccel.tuning.record import Record
from torchaccel.tuning.tasks import tasks_in
from torchaccel.tuning.tuned import Tuned

LINEAR = LinearSpec("float32", 3, False)
FUSED = CASES["between_attentions"]("bfloat16", 2)
SELECT = SelectionSpec(SummarySpec("mean", 64, "float32", "float32", 16), 2, "float32", 5)
SHAPES: dict[Spec, dict[str, int]] = {
    LINEAR: {"M": 3, "K": 70, "N": 42},
    FUSED: {"M": 2},
    SELECT: {"B": 2, "H_kv": 3, "Q": 1, "S": 4096},
}
CHOICES = [Candidate("cpp"), Candidate("cpp", (("streams", 1),)), Candidate("reference")]
OTHER = {LINEAR: 'cpp{"streams":1}', FUSED: 'cpp{"threads":"one"}', SELECT: 'cpp{"share":"tiles"}'}


def argument(graph: Graph, name: str, *shape: int) -> Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = torch.empty(shape, device="meta")
    return node


def graph_of(*carried: Spec) -> Graph:
    """A graph with one operator for each of the specs, which carry their seeds."""
    ops.library()
    graph = Graph()
    x, w, v = (argument(graph, name, *size) for name, size in (("x", (3, 70)), ("w", (30, 70)), ("v", (12, 70))))
    rows = argument(graph, "rows", 2, 70)
    q, summary, lens = (
        argument(graph, name, *size) for name, size in (("q", (2, 6, 1, 64)), ("s", (2, 3, 9, 64)), ("lens", (3,)))
    )
    call = torch.ops.torchaccel
    for spec in carried:
        if isinstance(spec, LinearSpec):
            graph.call_function(call.linear_rows.default, (x, [w, v], [None, None], spec.key()))
        elif isinstance(spec, FusedSpec):
            graph.call_function(call.fused_rows.default, ([rows], spec.key()))
        else:
            graph.call_function(call.select_blocks.default, (q, summary, lens, None, None, spec.key()))
    return graph


def carried(graph: Graph) -> list[str]:
    return [str(node.args[-1]) for node in graph.nodes if node.op == "call_function"]


def record(spec: Spec, candidate: str, ms: float, **shape: int) -> Record:
    return timing(candidate, ms, Key.of(spec, SHAPES[spec] | shape, MACHINE))


@pytest.mark.parametrize("spec", SHAPES, ids=["linear", "fused", "select"])
def test_an_operator_is_a_task_and_carries_what_was_fastest(spec: Spec) -> None:
    graph = graph_of(spec)
    (task,) = tasks_in(graph, 4096)
    assert task.spec == spec and dict(task.shape) == SHAPES[spec]
    fastest = Candidate.from_key(OTHER[spec])
    tuned = Tuned([record(spec, "cpp", 2.0), record(spec, OTHER[spec], 1.0), record(spec, "reference", 9.0)], MACHINE)
    (line,) = pick_kernels(graph, tuned, "cpu")
    assert line.endswith(OTHER[spec])
    assert carried(graph) == [Pick(spec, fastest).key()]
    # What was picked is still the same task, and picked again or given up by what is known then.
    assert tasks_in(graph, 4096) == [task]
    assert len(pick_kernels(graph, tuned, "cpu")) == 1 and carried(graph) == [Pick(spec, fastest).key()]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(LINEAR, "cpp", 1.0), record(LINEAR, 'cpp{"streams":1}', 0.97)],
        [record(LINEAR, "cpp", 1.0), timing("reference", 0.1, elsewhere(Key.of(LINEAR, SHAPES[LINEAR], MACHINE)))],
        [record(LINEAR, 'cpp{"streams":1}', 0.1, N=43)],
        [record(LINEAR, 'cpp{"streams":9}', 0.1)],
    ],
    ids=["nothing known", "as good", "elsewhere", "another size", "no candidate of this version"],
)
def test_otherwise_the_seed_remains(records: list[Record]) -> None:
    graph = graph_of(LINEAR, SELECT)
    before = carried(graph)
    assert pick_kernels(graph, Tuned(records, MACHINE), "cpu") == []
    assert carried(graph) == before


def test_a_seed_that_failed_is_not_taken() -> None:
    key = Key.of(LINEAR, SHAPES[LINEAR], MACHINE)
    tuned = Tuned([failure("cpp", key)], MACHINE)
    assert tuned.fastest(LINEAR, SHAPES[LINEAR], CHOICES) == CHOICES[1]
    both = Tuned([failure("cpp", key), timing("reference", 3.0, key)], MACHINE)
    assert both.fastest(LINEAR, SHAPES[LINEAR], CHOICES) == CHOICES[2]


def test_the_longest_cache_that_was_measured_decides_for_all_lengths() -> None:
    shape = {name: size for name, size in SHAPES[SELECT].items() if name != "S"}
    short = [record(SELECT, "cpp", 1.0, S=512), record(SELECT, "reference", 0.5, S=512)]
    long = [record(SELECT, "cpp", 1.0, S=65536), record(SELECT, "reference", 5.0, S=65536)]
    assert Tuned(short, MACHINE).fastest(SELECT, shape, CHOICES) == CHOICES[2]
    assert Tuned([*short, *long], MACHINE).fastest(SELECT, shape, CHOICES) == CHOICES[0]


def test_a_miss_is_an_error_where_hits_are_asserted() -> None:
    known = [record(LINEAR, "cpp", 1.0), record(SELECT, "cpp", 1.0)]
    assert pick_kernels(graph_of(LINEAR, SELECT), Tuned(known, MACHINE, assert_hit=True), "cpu") == []
    with pytest.raises(CacheMissError, match=r"no entry for fused M=2"):
        pick_kernels(graph_of(LINEAR, FUSED), Tuned(known, MACHINE, assert_hit=True), "cpu")
    with pytest.raises(CacheMissError, match=r"spec\.width: asked 7, found 5"):
        pick_kernels(graph_of(replace(SELECT, width=7)), Tuned(known, MACHINE, assert_hit=True), "cpu")


def test_a_shared_prompt_needs_two_kernels() -> None:
    ops.library()
    graph = Graph()
    q, new, own, prefix, mask = (
        argument(graph, name, *size)
        for name, size in (
            ("q", (6, 4, 1, 32)),
            ("new", (6, 2, 1, 32)),
            ("own", (6, 2, 20, 32)),
            ("prefix", (2, 2, 90, 32)),
            ("lens", (2, 3)),
        )
    )
    plans = [Plan(spec, ((None, Candidate("reference")),)).key() for spec in specs(DECODE)]
    args = (q, new, new, own, own, mask, None, [prefix, prefix], *plans)
    graph.call_function(torch.ops.torchaccel.attend_shared.default, args)
    assert [(task.spec, dict(task.shape)) for task in tasks_in(graph, 4096)] == [
        (specs(DECODE)[1], {"B": 2, "H_kv": 2, "Q": 3, "S": 4096}),
        (specs(DECODE)[0], {"B": 6, "H_kv": 2, "Q": 1, "S": 4096}),
    ]
    assert tasks_in(graph, None) == []
