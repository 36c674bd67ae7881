"""What ``analyze`` says about every family in every phase, checked against the model it came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule
from torchaccel.passes.canonicalize.attention import canonicalize_attention

from tests.graph.capture import (
    Captured,
    capture,
    capture_phase,
    encoder_call,
    filled_cache,
    inputs_of,
    phase_call,
    tokens,
)
from tests.models.families import CAUSAL, ENCODERS, WINDOW, build
from torchaccel.graph.anatomy import Anatomy, analyze

PHASES_OF = {name: ["prefill", "decode", "static"] for name in CAUSAL}
for with_extend in ("llama", "mistral", "gemma2", "gpt2"):
    PHASES_OF[with_extend].append("extend")
CASES = [(name, phase) for name, phases in PHASES_OF.items() for phase in phases]
CASES += [(name, "encoder") for name in ENCODERS]

LAYER_NAMES = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "bert": "encoder.layer",
    "vit": "layers",
}


def canonical_copy(found: Captured) -> GraphModule:
    module = found.copy()
    canonicalize_attention(module.graph)
    module.recompile()
    return module


def layers_of(model: nn.Module, name: str) -> nn.ModuleList:
    return model.get_submodule(LAYER_NAMES.get(name, "model.layers"))


def window_of(model: nn.Module, name: str, layer: int) -> int | None:
    return WINDOW if name == "mistral" or (name == "gemma2" and layer % 2 == 0) else None


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_facts(captured, model_of, name, phase):
    config = model_of(name).config
    anatomy = analyze(canonical_copy(captured(name, phase)))
    queries = {"prefill": 7, "extend": 3, "encoder": 17 if name == "vit" else 7}.get(phase, 1)
    assert anatomy.phase == {"static": "decode"}.get(phase, phase)
    assert (anatomy.batch, anatomy.query_length) == (2, queries)
    assert len(anatomy.attentions) == len(anatomy.layers) == config.num_hidden_layers
    for index, site in enumerate(anatomy.attentions):
        assert site.index == site.layer == index and anatomy.layers[index].attention is site
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        assert (site.heads, site.kv_heads, site.head_dim) == (config.num_attention_heads, kv_heads, 16)
        assert site.softcap == (50.0 if name == "gemma2" else None)
        assert site.dtype == torch.float32 and not site.causal
        assert (site.mask is None) == (name == "vit")
        assert site.name.startswith(f"{LAYER_NAMES.get(name, 'model.layers')}.{index}")
        check_caches(site, phase, window_of(model_of(name), name, index))


def check_caches(site: Any, phase: str, window: int | None) -> None:
    for cache, full in ((site.key_cache, site.k), (site.value_cache, site.v)):
        assert cache.full is full
        if phase == "encoder":
            assert cache.kind == "none" and cache.past is None and cache.stored is None and cache.new is full
        elif phase == "static":
            assert cache.kind == "static" and cache.past is full and cache.past.op == "placeholder"
            assert cache.write.args[0] is full and cache.write_positions.meta["example_value"].shape == (1,)
        else:
            fresh = "fresh" if phase == "prefill" else "concatenated"
            assert cache.kind == ("sliced" if window else fresh) and cache.window == window
            assert (cache.past is None) == (phase == "prefill")
            assert (cache.stored is full) == (window is None)
            assert cache.stored in site.node.graph.output_node().all_input_nodes
        if phase != "encoder":
            assert cache.new.meta["example_value"].shape[2] == site.q.meta["example_value"].shape[2]


@pytest.mark.parametrize("length", [5, 9])
def test_static_cache_from_its_first_prefill(model_of, length):
    """Buffers made in the graph; a prefill longer than the window is attended whole and its last positions kept."""
    model = model_of("mistral")
    cache = hf.StaticCache(config=model.config, max_cache_len=32)
    ids, mask = tokens(2, length)
    positions = {"position_ids": torch.arange(length)[None]}
    anatomy = analyze(canonical_copy(capture(model, ids, attention_mask=mask, past_key_values=cache, **positions)[0]))
    assert anatomy.phase == "prefill"
    for site in anatomy.attentions:
        for cache_site in (site.key_cache, site.value_cache):
            assert cache_site.kind == "static" and cache_site.past is None and cache_site.write is not None
            assert cache_site.new.meta["example_value"].shape[2] == length
            assert cache_site.full.meta["example_value"].shape[2] == max(length, WINDOW)
            assert cache_site.stored is not None and cache_site.window == (WINDOW if length > WINDOW else None)


def test_static_window_that_is_full_shifts(model_of):
    anatomy = analyze(canonical_copy(capture_phase(model_of("mistral"), "static", length=10)))
    assert anatomy.phase == "decode"
    for site in anatomy.attentions:
        cache = site.key_cache
        assert cache.kind == "static" and cache.past is site.k and cache.window == WINDOW
        assert cache.new.meta["example_value"].shape[2] == 1 and cache.write_positions is None


@pytest.mark.parametrize("length", [6, 10])
def test_static_window_that_overflows_with_several_tokens_is_unknown(model_of, length):
    model = model_of("mistral")
    ids, mask = tokens(2, length)
    cache = filled_cache(model, "static", ids, mask)
    step, _ = tokens(2, 4, seed=1)
    mask = torch.cat([mask, torch.ones_like(step)], -1)
    found = capture(model, step, past_key_values=cache, **inputs_of(mask, 4))
    anatomy = analyze(canonical_copy(found[0]))
    assert anatomy.phase == "extend" and {site.key_cache.kind for site in anatomy.attentions} == {"unknown"}


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_skipping_a_layer_equals_the_model_without_it(captured, model_of, name, phase):
    found, model, skipped = captured(name, phase), model_of(name), 1
    module = canonical_copy(found)
    layer = analyze(module).layers[skipped]
    layer.output.replace_all_uses_with(layer.input)
    module.graph.lint()
    module.recompile()
    step, arguments = encoder_call(model) if phase == "encoder" else phase_call(model, phase)
    hook = layers_of(model, name)[skipped].register_forward_hook(pass_through, with_kwargs=True)
    try:
        with torch.no_grad():
            expected = model(step, **arguments)[0]
    finally:
        hook.remove()
    place = found.module.graph.output_node().args[0].index(main_output(found))
    result = found.run(module)[place]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, found.outputs[place], rtol=1e-2, atol=1e-2)


def pass_through(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def main_output(found: Captured) -> torch.fx.Node:
    """Logits, or the last hidden states of an encoder: the graph's only rank-3 output."""
    outputs = found.module.graph.output_node().args[0]
    return next(node for node in outputs if node.meta["example_value"].dim() == 3)


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_structure_alone_finds_the_same_layers(captured, name, phase):
    module = canonical_copy(captured(name, phase))
    by_module = [(layer.input, layer.output) for layer in analyze(module).layers]
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    anatomy = analyze(module)
    assert [(layer.input, layer.output) for layer in anatomy.layers] == by_module
    assert all(site.node in anatomy.layers[site.layer].nodes for site in anatomy.attentions)


@pytest.mark.parametrize("name", CAUSAL)
def test_logits(captured, name):
    module = canonical_copy(captured(name, "prefill"))
    site = analyze(module).logits
    assert site.last_only and site.node in module.graph.output_node().all_input_nodes
    assert site.node.meta["example_value"].shape == (2, 1, 99)
    assert site.hidden.meta["example_value"].shape == (2, 7, 64)
    assert site.head.meta["example_value"].shape == (2, 1, 99)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_no_logits(captured, name):
    assert analyze(canonical_copy(captured(name, "encoder"))).logits is None


def test_logits_of_all_tokens(model_of):
    site = analyze(canonical_copy(capture_phase(model_of("llama"), "prefill", logits_to_keep=0))).logits
    assert not site.last_only and site.hidden.meta["example_value"].shape == (2, 7, 64)


def test_without_mask_prefill_is_causal(model_of):
    found = capture_phase(model_of("llama"), "prefill", padded=False, attention_mask=None)
    anatomy = analyze(canonical_copy(found))
    assert all(site.causal and site.mask is None for site in anatomy.attentions)
    assert anatomy.phase == "prefill"


@pytest.mark.parametrize("mask", [True, False])
def test_causal_model_without_cache_is_prefill(model_of, mask):
    ids = torch.arange(3, 10).expand(2, -1).contiguous()
    extra = {"attention_mask": torch.ones_like(ids)} if mask else {}
    anatomy = analyze(canonical_copy(capture(model_of("llama"), ids, use_cache=False, **extra)[0]))
    assert anatomy.phase == "prefill"
    assert {site.key_cache.kind for site in anatomy.attentions} == {"none"}


@pytest.mark.parametrize(("name", "phase"), [("llama", "prefill"), ("llama", "decode"), ("mistral", "decode")])
def test_dynamic_sizes_add_no_guard(model_of, name, phase):
    found = capture_phase(model_of(name), phase, dynamic=True)
    module = canonical_copy(found)
    environment = next(
        node.meta["example_value"].node.shape_env
        for node in module.graph.nodes
        if isinstance(node.meta.get("example_value"), torch.SymInt)
    )
    guards = len(environment.guards)
    anatomy = analyze(module)
    assert len(environment.guards) == guards
    assert len(anatomy.layers) == 3 and anatomy.attentions[0].key_cache.kind != "unknown"
    assert isinstance(anatomy.query_length, torch.SymInt) == (phase == "prefill")


def test_cross_attention_and_its_cache():
    config = hf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.T5ForConditionalGeneration(config).eval()
    encoded = hf.modeling_outputs.BaseModelOutput(torch.randn(2, 6, 32))
    ids = torch.tensor([[3], [4]])
    cache = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    found = capture(model, decoder_input_ids=ids, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
    sites = analyze(canonical_copy(found[0])).attentions
    assert [site.key_cache.kind for site in sites] == ["fresh", "cross"] * 2
    with torch.no_grad():
        model(decoder_input_ids=ids, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
    found = capture(model, decoder_input_ids=ids, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
    anatomy = analyze(canonical_copy(found[0]))
    assert [site.key_cache.kind for site in anatomy.attentions] == ["concatenated", "cross"] * 2
    assert anatomy.phase == "decode"
    assert [layer.name for layer in anatomy.layers] == ["decoder.block.0", "decoder.block.1"]
    assert [layer.attention.key_cache.kind for layer in anatomy.layers] == ["concatenated"] * 2


def test_one_layer_by_structure():
    module = canonical_copy(capture_phase(build("llama", layers=1), "prefill"))
    expected = [(layer.input, layer.output) for layer in analyze(module).layers]
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    assert len(expected) == 1
    assert [(layer.input, layer.output) for layer in analyze(module).layers] == expected


# --- toys: what is not understood is said so --------------------------------------------------------------------------


class Toy(nn.Module):
    """One attention without residual stream, over keys that ``keys`` makes."""

    def __init__(self, keys: Any) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)
        self.keys = keys

    def forward(self, x: Tensor, past: Tensor) -> Any:
        q = self.project(x).view(2, -1, 2, 8).transpose(1, 2)
        k, kept = self.keys(q, past)
        return F.scaled_dot_product_attention(q, k, k), kept


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (lambda k, past: (torch.cat([past.flip(2), k], 2), past + 1), "unknown"),
        (lambda k, past: (torch.cat([k[:, :, :1], k[:, :, 1:] * 2], 2), past), "none"),
        (lambda k, past: (past * 2, past), "unknown"),
        (lambda k, past: (past, k), "cross"),
        (lambda k, past: (k, k), "fresh"),
        (lambda k, past: (k, k[:, :, -3:, :]), "sliced"),
        (lambda k, past: (k, past), "none"),
    ],
)
def test_cache_kinds_of_toys(keys, kind):
    found = capture(Toy(keys).eval(), torch.randn(2, 5, 16), torch.randn(2, 2, 5, 8))[0]
    anatomy: Anatomy = analyze(canonical_copy(found))
    assert {cache.kind for site in anatomy.attentions for cache in (site.key_cache, site.value_cache)} == {kind}
    assert anatomy.layers == [] and anatomy.attentions[0].layer is None


def test_no_attention_no_anatomy():
    anatomy = analyze(canonical_copy(capture(nn.Linear(4, 4), torch.randn(2, 4))[0]))
    assert anatomy == Anatomy("unknown", [], [], None, 0, 0)
