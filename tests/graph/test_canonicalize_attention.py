"""Every spelling of attention becomes one canonical node, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaccel.passes.canonicalize.attention import AttentionReason, AttentionRewrite, canonicalize_attention

from tests.graph.capture import Captured, capture
from tests.models.families import CAUSAL, ENCODERS
from torchaccel.graph import canonical
from torchaccel.graph.nodes import op_name

EAGER = ["llama", "mistral", "gpt2", "gpt_neox", "opt"]
CASES = [(name, phase, None) for name in CAUSAL for phase in ("prefill", "decode", "static")]
CASES += [(name, "extend", None) for name in ("llama", "mistral", "gemma2", "gpt2")]
CASES += [(name, "encoder", impl) for name in ENCODERS for impl in (None, "eager")]
CASES += [(name, phase, "eager") for name in EAGER for phase in ("prefill", "decode")]


def rewrite(found: Captured) -> tuple[list[AttentionRewrite], torch.fx.GraphModule]:
    module = found.copy()
    rewritten = canonicalize_attention(module.graph)
    module.recompile()
    return rewritten, module


def assert_same_results(found: Captured, module: torch.fx.GraphModule) -> None:
    for before, after in zip(found.run(), found.run(module), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "phase", "impl"), CASES)
def test_families_become_canonical_and_keep_their_results(captured, model_of, name, phase, impl):
    found = captured(name, phase, impl)
    rewritten, module = rewrite(found)
    config = model_of(name, impl).config
    assert len(rewritten) == config.num_hidden_layers
    source = "eager" if impl == "eager" or name == "gemma2" else "sdpa"
    for site in rewritten:
        assert site.reason is None and site.source == source
        q, k, v = site.node.args[:3]
        assert q.meta["example_value"].shape[1] == config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        assert k.meta["example_value"].shape[1] == v.meta["example_value"].shape[1] == kv_heads
        assert site.node.kwargs["softcap"] == (50.0 if name == "gemma2" else None)
        assert site.node.kwargs["scale"] == pytest.approx(1.0 if name == "opt" else 0.25)
        assert (
            site.node.meta["nn_module_stack"] and site.node.meta["example_value"].shape == q.meta["example_value"].shape
        )
    left = [op_name(node) for node in module.graph.nodes]
    assert "scaled_dot_product_attention" not in left
    assert "softmax" not in left or name == "mixtral"  # its router
    assert_same_results(found, module)


# --- one toy per spelling ---------------------------------------------------------------------------------------------


def qkv(heads: int = 4, kv_heads: int = 4, queries: int = 5, keys: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8)]
    return [torch.randn(size, generator=generator) for size in sizes]


MASK = torch.ones(5, 5, dtype=torch.bool).tril()
LOWEST = torch.finfo(torch.float32).min


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


def sdpa_positional(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


def sdpa_own_scale_and_bool_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=MASK, scale=0.3)


def scale_on_queries(q, k, v):
    return finish((q * 0.3) @ k.transpose(-1, -2), v)


def scale_on_keys(q, k, v):
    return finish(torch.matmul(q, (k * 0.3).transpose(2, 3)), v)


def divided_by_root(q, k, v):
    return finish(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(8), v)


def masked_fill_lowest(q, k, v):
    return finish((torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.3).masked_fill(~MASK, LOWEST), v)


def where_lowest(q, k, v):
    return finish(torch.where(MASK, q @ k.transpose(2, 3) * 0.3, LOWEST), v)


def mask_then_bias(q, k, v):
    bias = torch.arange(5.0).expand(4, 5, 5)
    return finish(q @ k.transpose(2, 3) * 0.3 + bias + torch.where(MASK, 0.0, LOWEST), v)


def softcapped(q, k, v):
    return finish(torch.tanh(q @ k.transpose(2, 3) * 0.3 / 20.0) * 20.0, v)


def no_dropout(q, k, v):
    weights = F.softmax(q @ k.transpose(2, 3), dim=-1)
    return F.dropout(weights, 0.5, training=False) @ v


def viewed_after(q, k, v):
    return finish(q @ k.transpose(2, 3) * 0.3, v).view(2, -1, 8)


SPELLINGS = [
    *(sdpa_positional, sdpa_own_scale_and_bool_mask, scale_on_queries, scale_on_keys, divided_by_root),
    *(masked_fill_lowest, where_lowest, mask_then_bias, softcapped, no_dropout, viewed_after),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling):
    found = capture(spelling, *qkv())[0]
    rewritten, module = rewrite(found)
    assert [site.reason for site in rewritten] == [None]
    assert sum(node.target is canonical.attention for node in module.graph.nodes) == 1
    mask = rewritten[0].node.args[3]
    assert mask is None or mask.meta["example_value"].dim() in (2, 4)
    assert_same_results(found, module)


def repeat_kv(x):
    b, h, n, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)),
        lambda q, k, v: finish(q @ repeat_kv(k).transpose(2, 3), repeat_kv(v)),
    ],
)
def test_grouped_queries_read_unrepeated_keys(attend):
    found = capture(attend, *qkv(heads=4, kv_heads=2))[0]
    rewritten, module = rewrite(found)
    assert rewritten[0].node.args[1].meta["example_value"].shape[1] == 2
    assert not any(op_name(node) in ("expand", "repeat_interleave") for node in module.graph.nodes)
    assert_same_results(found, module)


def test_a_router_softmax_is_no_attention():
    def router(x, w):
        return F.softmax(x @ w, dim=-1) @ w.transpose(0, 1)

    found = capture(router, torch.randn(3, 4), torch.randn(4, 4))[0]
    assert rewrite(found)[0] == [] or rewrite(found)[0][0].reason is not None


# --- one toy per reason to leave an attention alone -------------------------------------------------------------------


def returns_weights(q, k, v):
    weights = F.softmax(q @ k.transpose(2, 3), dim=-1)
    return weights @ v, weights


def tensor_scale(q, k, v):
    return finish(q @ k.transpose(2, 3) * v.mean(), v)


def cube(x: Tensor) -> Tensor:
    return x[:, 0]


DECLINES: dict[AttentionReason, tuple[Any, list[Tensor]]] = {
    AttentionReason.DROPOUT: (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), qkv()),
    AttentionReason.WEIGHTS_USED: (returns_weights, qkv()),
    AttentionReason.RANK_NOT_FOUR: (lambda q, k, v: F.scaled_dot_product_attention(cube(q), cube(k), cube(v)), qkv()),
    AttentionReason.CAUSAL_NOT_SQUARE: (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        qkv(keys=7),
    ),
    AttentionReason.UNKNOWN_SCORES: (tensor_scale, qkv()),
    AttentionReason.UNKNOWN_MASK: (
        lambda q, k, v: finish((q @ k.transpose(2, 3)).masked_fill(MASK, -1.0), v),
        qkv(),
    ),
    AttentionReason.UNKNOWN_HEADS: (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v), qkv()),
}


@pytest.mark.parametrize("reason", list(AttentionReason))
def test_reasons(reason):
    attend, inputs = DECLINES[reason]
    found = capture(attend, *inputs)[0]
    before = str(found.module.graph)
    rewritten, module = rewrite(found)
    assert [site.reason for site in rewritten] == [reason]
    assert rewritten[0].detail and rewritten[0].node is None
    assert str(module.graph) == before


def test_eager_dropout_in_training_is_left_alone():
    def train(q, k, v):
        return F.dropout(F.softmax(q @ k.transpose(2, 3), dim=-1), 0.5, training=True) @ v

    assert rewrite(capture(train, *qkv())[0])[0][0].reason is AttentionReason.DROPOUT


def test_output_attentions_is_left_alone(model_of):
    model = model_of("llama", "eager")
    ids = torch.arange(3, 9)[None]
    found = capture(model, ids, output_attentions=True, use_cache=False)[0]
    assert {site.reason for site in rewrite(found)[0]} == {AttentionReason.WEIGHTS_USED}
