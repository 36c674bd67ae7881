"""The token ids of a graph: found in every family and phase, and not where it is given embeddings."""

import pytest
import torch
from torchaccel.passes.canonicalize.attention import canonicalize_attention

from tests.graph.capture import capture, capture_phase, filled_cache, tokens
from tests.models.families import CAUSAL, build
from torchaccel.graph.anatomy import analyze


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("family", CAUSAL)
def test_the_ids_of_a_call_are_found(family, phase):
    overrides = {"max_position_embeddings": 99} if family in ("opt", "gpt2") else {}  # as many as tokens
    captured = capture_phase(build(family, **overrides), phase)
    module = captured.copy()
    canonicalize_attention(module.graph)
    found = analyze(module).ids
    assert found is not None
    module.graph.output_node().args = ((found,),)
    module.recompile()
    asked, _ = tokens(2, 7, padded=True) if phase == "prefill" else tokens(2, 1, seed=1)
    assert torch.equal(captured.run(module)[0], asked)


def test_a_graph_that_is_given_embeddings_has_none():
    model = build("llama")
    given = torch.randn(2, 7, 64)
    cache = filled_cache(model, "empty", given, given)
    captured = capture(model, inputs_embeds=given, past_key_values=cache, use_cache=True)[0]
    module = captured.copy()
    canonicalize_attention(module.graph)
    assert analyze(module).ids is None
