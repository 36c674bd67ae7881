"""Narrowing the sequence equals running the model's later layers on the kept tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchaccel.passes.canonicalize.attention import canonicalize_attention

from tests.graph.capture import Captured, capture, capture_phase, inputs_of, tokens
from tests.models.families import build
from torchaccel.graph.anatomy import analyze
from torchaccel.graph.layout import Factor, dim, regroup
from torchaccel.graph.narrow import UntrackedSequenceError, narrow_sequence
from torchaccel.graph.nodes import op_name
from torchaccel.graph.propagate import annotate

BOUNDARY = 1
KEEP = {4: [[0, 3], [1, 3]], 7: [[3, 5, 6], [0, 2, 6]], 16: [[3, 4, 9, 15], [0, 7, 8, 15]]}


def narrowed(found: Captured, indices: Any, layer: int = BOUNDARY) -> GraphModule:
    module = found.copy()
    canonicalize_attention(module.graph)
    boundary = analyze(module).layers[layer].input
    narrow_sequence(module.graph, boundary, insert_indices(module, boundary, indices))
    module.graph.lint()
    module.recompile()
    return module


def insert_indices(module: GraphModule, boundary: Node, indices: Any) -> Node:
    with module.graph.inserting_after(boundary):
        return annotate(module.graph.call_function(torch.tensor, (indices,)))


# --- an independent computation: the model's own layers, called one by one --------------------------------------------


def expected_of(model: nn.Module, ids: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Any]:
    """Logits of the last token ``[B, 1, V]`` and the cache, with the layers from ``BOUNDARY`` on over kept tokens."""
    cache = hf.DynamicCache(config=model.config)
    columns = torch.arange(ids.shape[1])
    seen = (columns[:, None] >= columns) & mask.bool()[:, None, None, :]
    rows = torch.arange(ids.shape[0])[:, None]
    seen_kept = seen[rows[:, :, None], :, keep[:, :, None], keep[:, None, :]].permute(0, 3, 1, 2)
    run = _run_gpt2 if isinstance(model, hf.GPT2LMHeadModel) else _run_llama
    with torch.no_grad():
        hidden = run(model, ids, inputs_of(mask, ids.shape[1])["position_ids"], keep, (seen, seen_kept), cache)
        return model.lm_head(hidden[:, -1:]), cache


def _run_llama(model: Any, ids: Tensor, positions: Tensor, keep: Tensor, masks: Any, cache: Any) -> Tensor:
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, positions)
    mask = masks[0]
    for index, layer in enumerate(model.model.layers):
        if index == BOUNDARY:
            hidden = gather(hidden, keep)
            rotary = tuple(gather(table, keep) for table in rotary)
            mask = masks[1]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
    return model.model.norm(hidden)


def _run_gpt2(model: Any, ids: Tensor, positions: Tensor, keep: Tensor, masks: Any, cache: Any) -> Tensor:
    hidden = model.transformer.wte(ids) + model.transformer.wpe(positions)
    mask = masks[0]
    for index, block in enumerate(model.transformer.h):
        if index == BOUNDARY:
            hidden, mask = gather(hidden, keep), masks[1]
        hidden = block(hidden, past_key_values=cache, attention_mask=mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.transformer.ln_f(hidden)


def gather(x: Tensor, keep: Tensor) -> Tensor:
    return x.expand(keep.shape[0], -1, -1)[torch.arange(keep.shape[0])[:, None], keep]


CASES = [
    (name, batch, length, dynamic)
    for name in ("llama", "qwen2", "gpt2")
    for batch, length, dynamic in ((1, 7, False), (2, 7, False), (2, 7, True))
]
# a sequence as long as there are heads, or as a head is wide, must not be taken for them
CASES += [("llama", 2, 4, False), ("llama", 2, 16, False), ("gpt2", 2, 4, False), ("gpt2", 1, 16, False)]


@pytest.mark.parametrize(("name", "batch", "length", "dynamic"), CASES)
def test_equals_later_layers_on_kept_tokens(captured, model_of, name, batch, length, dynamic):
    padded = batch > 1 and length > 4
    found = captured(name, "prefill", batch=batch, length=length, padded=padded, dynamic=dynamic)
    keep = torch.tensor(KEEP[length][:batch])
    check(found, narrowed(found, keep.tolist()), model_of(name), (batch, length, padded), keep)


def check(found: Captured, module: GraphModule, model: nn.Module, call: tuple[int, int, bool], keep: Tensor) -> None:
    ids, mask = tokens(*call)
    logits, cache = expected_of(model, ids, mask, keep)
    outputs = found.run(module)
    torch.testing.assert_close(outputs[-1], logits, rtol=1e-4, atol=1e-4)
    sites = analyze(module).attentions
    results = module.graph.output_node().args[0]
    for site, layer in zip(sites, cache.layers, strict=True):
        rows = ids.shape[1] if site.index < BOUNDARY else keep.shape[1]
        for stored, reference in ((site.key_cache.stored, layer.keys), (site.value_cache.stored, layer.values)):
            result = outputs[results.index(stored)]
            assert result.shape[2] == rows
            torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_without_mask(model_of, name):
    found = capture_phase(model_of(name), "prefill", batch=1, padded=False, attention_mask=None)
    module = narrowed(found, KEEP[7][:1])
    assert all(site.causal and site.mask is None for site in analyze(module).attentions)
    check(found, module, model_of(name), (1, 7, False), torch.tensor(KEEP[7][:1]))


def test_number_of_kept_tokens_can_be_symbolic(model_of):
    found = capture_phase(model_of("llama"), "prefill", batch=1, padded=False, dynamic=True)
    module = found.copy()
    canonicalize_attention(module.graph)
    boundary = analyze(module).layers[BOUNDARY].input
    graph = module.graph
    with graph.inserting_after(boundary):
        length = annotate(graph.call_method("size", (boundary, 1)))
    with graph.inserting_after(length):
        row = annotate(graph.call_function(torch.arange, (1, length, 2)))
    with graph.inserting_after(row):
        keep = annotate(graph.call_method("unsqueeze", (row, 0)))
    narrow_sequence(graph, boundary, keep)
    graph.lint()
    module.recompile()
    check(found, module, model_of("llama"), (1, 7, False), torch.tensor([[1, 3, 5]]))


def test_no_guard_is_added(model_of):
    found = capture_phase(model_of("llama"), "prefill", dynamic=True)
    values = [node.meta.get("example_value") for node in found.module.graph.nodes]
    environment = next(value.node.shape_env for value in values if isinstance(value, torch.SymInt))
    guards = len(environment.guards)
    narrowed(found, KEEP[7])
    assert len(environment.guards) == guards


def test_narrowing_twice(captured, model_of):
    found = captured("llama", "prefill")
    module = narrowed(found, KEEP[7])
    boundary = analyze(module).layers[2].input
    narrow_sequence(module.graph, boundary, insert_indices(module, boundary, [[0, 2], [1, 2]]))
    module.graph.lint()
    module.recompile()
    anatomy = analyze(module)
    assert [site.k.meta["example_value"].shape[2] for site in anatomy.attentions] == [7, 3, 2]
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    spans = [(layer.input, layer.output) for layer in anatomy.layers]
    assert [(layer.input, layer.output) for layer in analyze(module).layers] == spans
    outputs = found.run(module)
    whole = narrowed(found, [[3, 5, 6], [0, 2, 6]])
    torch.testing.assert_close(outputs[:4], found.run(whole)[:4])  # up to the second boundary nothing changed
    assert torch.isfinite(outputs[-1]).all()


def test_keeping_everything_changes_nothing(captured):
    for name in ("llama", "mistral", "gemma2", "phi3", "gpt_neox", "opt", "qwen3", "gpt2"):
        found = captured(name, "prefill")
        module = narrowed(found, [list(range(7))] * 2)
        torch.testing.assert_close(found.run(module), found.run(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders(captured, name):
    found = captured(name, "encoder", batch=2, padded=False)
    module = narrowed(found, [[0, 2, 3]] * 2)
    hidden = found.run(module)[0]
    assert hidden.shape == (2, 3, 64)
    length = 17 if name == "vit" else 7
    torch.testing.assert_close(found.run(narrowed(found, [list(range(length))] * 2))[0], found.run()[0])


def test_outside_tensors_are_gathered_once(captured):
    found = captured("llama", "prefill")
    before = [op_name(node) for node in found.module.graph.nodes].count("take_along_dim")
    module = narrowed(found, KEEP[7])
    names = [op_name(node) for node in module.graph.nodes]
    assert names.count("take_along_dim") - before == 5  # hidden states, cos, sin, mask rows, mask columns


def test_example_values_are_refreshed(captured):
    module = narrowed(captured("llama", "prefill"), KEEP[7])
    anatomy = analyze(module)
    for layer in anatomy.layers[BOUNDARY:]:
        assert layer.output.meta["example_value"].shape == (2, 3, 64)
        assert layer.attention.mask.meta["example_value"].shape == (2, 1, 3, 3)
        assert layer.attention.q.meta["example_value"].shape == (2, 4, 3, 16)


# --- what cannot be followed raises, and the graph stays as it was ----------------------------------------------------


class Toy(nn.Module):
    """A residual stream with one step that ``step`` makes of it."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(8, 8), nn.Linear(8, 8), step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.last(self.first(x)))


STEPS = {
    "mean": lambda x: x.mean(1),
    "cumsum": lambda x: x.cumsum(1),
    "reshape": lambda x: x.reshape(x.shape[0], 2, 3, 8),
    "getitem": lambda x: x[:, 2],
    "linear": lambda x: F.linear(x.transpose(1, 2), torch.ones(4, 6)),
    "cat": lambda x: torch.cat([torch.ones(2, 1, 8), x], 1),
    "matmul": lambda x: torch.ones(5, 6) @ x,
    "add": lambda x: x[:, -3:] + torch.ones(3, 8),
    "layer_norm": lambda x: F.layer_norm(x, (6, 8)),
    "topk": lambda x: x.topk(2, dim=1)[0],
}


@pytest.mark.parametrize("operator", list(STEPS))
def test_untracked_operators_are_named(operator):
    module = capture(Toy(STEPS[operator]).eval(), torch.randn(2, 6, 8))[0].copy()
    boundary = next(node for node in module.graph.nodes if op_name(node) == "linear")
    keep = insert_indices(module, boundary, [[0, 5], [1, 5]])
    before = str(module.graph)
    with pytest.raises(UntrackedSequenceError, match="cannot narrow") as raised:
        narrow_sequence(module.graph, boundary, keep)
    assert op_name(raised.value.node) == operator
    assert str(module.graph) == before


def test_mixture_of_experts_is_declined(captured):
    found = captured("mixtral", "prefill")
    with pytest.raises(UntrackedSequenceError, match="topk"):
        narrowed(found, KEEP[7])


def test_indices_must_come_before_their_use(captured):
    module = captured("llama", "prefill").copy()
    canonicalize_attention(module.graph)
    layers = analyze(module).layers
    keep = insert_indices(module, layers[1].output, KEEP[7])
    before = str(module.graph)
    with pytest.raises(UntrackedSequenceError, match="before the indices"):
        narrow_sequence(module.graph, layers[1].input, keep)
    assert str(module.graph) == before


def test_a_failed_check_restores_the_graph(captured):
    module = captured("llama", "prefill").copy()
    canonicalize_attention(module.graph)
    boundary = analyze(module).layers[BOUNDARY].input
    keep = insert_indices(module, boundary, KEEP[7])
    keep.meta["example_value"] = keep.meta["example_value"].new_zeros((3, 3))  # a wrong number of rows
    before = str(module.graph)
    with pytest.raises(Exception):  # noqa: B017 - whatever the check says, the graph must be whole
        narrow_sequence(module.graph, boundary, keep)
    assert str(module.graph) == before


def test_boundary_must_be_hidden_states(captured):
    module = captured("llama", "prefill").copy()
    canonicalize_attention(module.graph)
    site = analyze(module).attentions[0]
    with pytest.raises(UntrackedSequenceError, match="rank 3"):
        narrow_sequence(module.graph, site.q, insert_indices(module, site.q, KEEP[7]))


# --- layouts ----------------------------------------------------------------------------------------------------------

B, N = dim(2, "batch"), dim(6, "sequence")


@pytest.mark.parametrize(
    ("layout", "sizes", "expected"),
    [
        ((B, N, dim(6)), (2, 6, 2, 3), (B, N, dim(2), dim(3))),
        ((B, N, dim(36)), (2, 6, 6, 6), (B, N, dim(6), dim(6))),
        ((B, N, dim(4)), (12, 4), ((*B, *N), dim(4))),
        (((*B, *N), dim(4)), (2, 6, 4), (B, N, dim(4))),
        ((B, N, dim(4)), (2, 24), (B, (*N, Factor(4)))),
        ((dim(1), N, dim(4)), (6, 4), (N, dim(4))),
        ((B, N, dim(4)), (2, 3, 8), None),
        ((B, N, dim(4)), (4, 12), None),
        ((dim(3), dim(8)), (4, 6), (dim(4), dim(6))),
    ],
)
def test_regroup(layout, sizes, expected):
    assert regroup(layout, sizes) == expected


def test_attention_left_eager():
    """Attention that could not be made canonical is followed as plain matmuls and softmax."""
    model = build("llama", attn_implementation="eager")
    ids, mask = tokens(2, 7, True)
    found = capture(model, ids, output_attentions=True, use_cache=False, **inputs_of(mask, 7))[0]
    module = found.copy()
    assert all(site.node is None for site in canonicalize_attention(module.graph))
    boundary = next(n for n in module.graph.nodes if n.name == "hidden_states_9")
    narrow_sequence(module.graph, boundary, insert_indices(module, boundary, KEEP[7]))
    module.recompile()
    logits, _ = expected_of(build("llama"), ids, mask, torch.tensor(KEEP[7]))
    hidden = found.run(module)[-1]
    assert hidden.shape == (2, 3, 64)
    torch.testing.assert_close(model.lm_head(hidden[:, -1:]), logits, rtol=1e-4, atol=1e-4)
