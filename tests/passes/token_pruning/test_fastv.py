"""FastV: the ranking from the paper, and a pruned model equal to one run layer by layer on the kept tokens."""

import pytest
import torch
from torchaccel.passes.token_pruning.fastv import rank_tokens
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt

KEEP, LAYER = 0.5, 2
OPTIONS = {"token_pruning": {"method": "fastv", "keep": KEEP, "layer": LAYER}}


def test_ranking_averages_heads_and_protects_first_and_last():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 7, 8, generator=generator), torch.randn(1, 2, 7, 8, generator=generator)
    weight = torch.zeros(7)
    for head in range(4):
        weight += (q[0, head, -1] @ k[0, head // 2].T * 0.3).softmax(-1)
    best = sorted(range(1, 6), key=lambda i: -weight[i])[:2]
    assert rank_tokens(q, k, None, 0.3, 4).tolist() == [sorted([0, 6, *best])]


def test_padding_is_kept_only_when_a_row_is_too_short():
    q, k = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask[0, :, :, :5] = False
    kept = rank_tokens(q, k, mask, 0.3, 4)
    assert kept[0].tolist()[1:] == [5, 6, 7] and kept[0, 0] < 5
    assert kept[1, 0] == 0 and kept[1, -1] == 7


def reference(model, ids, steps):
    """Logits of the last prompt token and of each step, computed layer by layer with the model's own modules."""
    body, config = model.model, model.config
    caches = []

    def run(layer, hidden, cos, sin, place):
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        shape = (*x.shape[:2], -1, attention.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if place < len(caches):
            k, v = (torch.cat([old, new], 2) for old, new in zip(caches[place], (k, v), strict=True))
            caches[place] = (k, v)
        else:
            caches.append((k, v))
        group = config.num_attention_heads // config.num_key_value_heads
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ keys.transpose(2, 3) * attention.scaling
        if hidden.shape[1] > 1:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        weights = scores.softmax(-1)
        out = (weights @ values).transpose(1, 2).flatten(2)
        hidden = hidden + attention.o_proj(out)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights

    hidden, length = body.embed_tokens(ids), ids.shape[1]
    positions = torch.arange(length)[None]
    cos, sin = body.rotary_emb(hidden, positions)
    weights = torch.empty(0)
    for place, layer in enumerate(body.layers):
        if place == LAYER:
            score = weights[0, :, -1].mean(0)
            score[0] = score[-1] = 2.0
            kept = score.topk(int(length * KEEP)).indices.sort().values
            hidden, cos, sin = hidden[:, kept], cos[:, kept], sin[:, kept]
        hidden, weights = run(layer, hidden, cos, sin, place)
    logits = [model.lm_head(body.norm(hidden[:, -1:]))]
    for number, token in enumerate(steps):
        hidden = body.embed_tokens(token)
        cos, sin = body.rotary_emb(hidden, torch.tensor([[length + number]]))
        for place, layer in enumerate(body.layers):
            hidden, _ = run(layer, hidden, cos, sin, place)
        logits.append(model.lm_head(body.norm(hidden)))
    return logits, [k.shape[2] for k, _ in caches]


@pytest.mark.parametrize("lengths", [(16,), (41, 42, 123)])
def test_equals_the_model_run_by_hand_on_the_kept_tokens(lengths):
    eager, fast = compiled("llama", layers=4, options=OPTIONS)
    steps = [prompt(1, 1, seed=s)["input_ids"] for s in range(3)]
    for length in lengths:
        ids = prompt(1, length, seed=length)["input_ids"]
        with torch.no_grad():
            expected, physical = reference(eager, ids, steps)
            cache = DynamicCache(config=fast.config)
            got = [fast(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
            got += [fast(step, past_key_values=cache, use_cache=True).logits for step in steps]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)
        assert [layer.keys.end - layer.keys.start for layer in cache.layers] == physical
        assert cache.get_seq_length() == length + 3


def test_keeping_everything_is_exact():
    options = {"token_pruning": {"method": "fastv", "keep": 1.0, "layer": 1}}
    eager, fast = compiled("llama", options=options)
    inputs = prompt(3, 21, padding=(0, 8, 2))
    assert torch.equal(greedy(fast, inputs, 20), greedy(eager, inputs, 20))
    assert phases(fast) == ["prefill", "decode"]


def test_a_padded_row_keeps_its_own_tokens():
    """A row behind padding prunes as if alone when both have the same number to keep."""
    _, fast = compiled("llama", layers=4, options={"token_pruning": {"method": "fastv", "keep": 0.9, "layer": 2}})
    inputs = prompt(2, 20, padding=(0, 8))
    alone = {name: value[1:, 8:] for name, value in inputs.items()}
    # 18 of 20 slots are kept, so every one of the padded row's 12 tokens is; alone with keep 1 that is the exact model.
    eager = compiled("llama", layers=4)[0]
    assert torch.equal(greedy(fast, inputs, 10)[1, 8:], greedy(eager, alone, 10)[0])


def test_declines_when_every_position_has_logits():
    eager, fast = compiled("llama", options=OPTIONS)
    ids = prompt(1, 12)["input_ids"]
    with pytest.warns(UserWarning, match="returns logits of every position"), torch.no_grad():
        got = fast(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(got, eager(ids).logits, atol=2e-5, rtol=2e-5)
    assert torchaccel.report(fast).effective == {}
