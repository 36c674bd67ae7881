"""Norms, feed-forward blocks and sublayers: what the sites say is what the graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torchaccel.passes.canonicalize.attention import canonicalize_attention

from tests.graph.capture import Captured, phase_call
from tests.models.families import CAUSAL, ENCODERS
from torchaccel.graph.anatomy import analyze
from torchaccel.graph.blocks import Blocks, MlpSite, NormSite, find_blocks

CASES = [(name, "prefill") for name in CAUSAL] + [(name, "encoder") for name in ENCODERS]
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
EXPECTED = {
    "gemma2": "gelu_tanh",
    "gpt2": "gelu_tanh",
    "gpt_neox": "gelu",
    "opt": "relu",
    "bert": "gelu",
    "vit": "gelu",
}


def blocks_of(found: Captured) -> tuple[GraphModule, Blocks]:
    module = found.copy()
    canonicalize_attention(module.graph)
    module.recompile()
    return module, find_blocks(module.graph, analyze(module))


def values_of(module: GraphModule, found: Captured) -> dict[Node, Any]:
    """Value of every node in a run on the recorded inputs."""

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    values: dict[Node, Any] = {}
    with torch.no_grad():
        Recorder(module).run(*found.inputs)
    return values


def normed(site: NormSite, values: dict[Node, Any]) -> Tensor:
    x = values[site.input].float()
    weight = 1.0 if site.weight is None else values[site.weight].float() + site.weight_offset
    bias = 0.0 if site.bias is None else values[site.bias]
    if site.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + site.eps).sqrt() * weight + bias


def entering_down(site: MlpSite, values: dict[Node, Any]) -> Tensor:
    activate = ACTIVATIONS[site.activation]
    return activate(values[site.up]) if site.gate is None else activate(values[site.gate]) * values[site.up]


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_families(captured, model_of, name, phase):
    found = captured(name, phase)
    module, blocks = blocks_of(found)
    values = values_of(module, found)
    layers = model_of(name).config.num_hidden_layers
    assert len(blocks.norms) == layers * {"gemma2": 4, "qwen3": 4}.get(name, 2) + 1
    for norm in blocks.norms:
        torch.testing.assert_close(values[norm.output], normed(norm, values), rtol=1e-4, atol=1e-4)
        assert norm.weight_offset == (1.0 if name == "gemma2" else 0.0)
    assert len(blocks.mlps) == layers
    for mlp in blocks.mlps:
        if name == "mixtral":
            assert mlp is None
            continue
        assert mlp.activation == EXPECTED.get(name, "silu")
        assert (mlp.gate is None) == (name in ("gpt2", "gpt_neox", "opt", *ENCODERS))
        assert len(mlp.projections) == (1 if mlp.gate is None or name == "phi3" else 2)
        expected = entering_down(mlp, values).reshape(values[mlp.hidden].shape)
        torch.testing.assert_close(values[mlp.hidden], expected, rtol=1e-4, atol=1e-4)
        assert mlp.input in {norm.output for norm in blocks.norms}


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_sublayers_are_branches_of_the_stream(captured, name, phase):
    found = captured(name, phase)
    module, blocks = blocks_of(found)
    kinds = ["both"] if name == "gpt_neox" else ["attention", "mlp"]
    anatomy = analyze(module)
    assert [s.kind for s in blocks.sublayers] == kinds * len(anatomy.layers)
    for before, after in zip(blocks.sublayers, blocks.sublayers[1:], strict=False):
        assert before.output is after.input
    for layer in anatomy.layers:
        own = [s for s in blocks.sublayers if s.layer == layer.index]
        assert own[0].input is layer.input and own[-1].output is layer.output


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_skipping_the_mlp_equals_the_model_without_it(captured, model_of, name):
    found, model = captured(name, "prefill"), model_of(name)
    module, blocks = blocks_of(found)
    sublayer = next(s for s in blocks.sublayers if s.kind == "mlp" and s.layer == 1)
    sublayer.output.replace_all_uses_with(sublayer.input)
    module.recompile()
    mlp = model.model.layers[1].mlp if name == "llama" else model.transformer.h[1].mlp
    hook = mlp.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    try:
        step, arguments = phase_call(model, "prefill")
        with torch.no_grad():
            expected = model(step, **arguments).logits
    finally:
        hook.remove()
    torch.testing.assert_close(found.run(module)[-1], expected, rtol=1e-4, atol=1e-4)
