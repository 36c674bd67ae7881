"""CSKV against factors applied to the cache of eager attention, written from the publication; bytes; other caches."""

import pytest
import torch
from torchaccel.passes.kv_compression.cskv import basis_of
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.models.families import build

WINDOW = 16
RANKS = {"key_density": 0.5, "value_density": 0.75}


def plan_for(family="llama", seed=5, **options):
    return torchaccel.calibrate(
        build(family), "cskv", [prompt(2, 60, padding=(0, 9), seed=seed)], {"window": WINDOW, **RANKS, **options}
    )


@pytest.fixture(scope="module")
def plan():
    return plan_for()


def turned(x, cos, sin, back=False):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * (-sin if back else sin)


def reduced(x, basis):
    """Tokens ``[B, H, n, D]`` as their latents give them."""
    flat = x.transpose(1, 2).flatten(2)
    return (flat @ basis.T @ basis).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def factored(model, plan, window=WINDOW):
    """``model`` (in place) with attention to old tokens as the factors of a plan leave them, prompts exact."""
    rotary = model.model.rotary_emb

    def attention(module, q, k, v, mask, scaling, **_):
        total = k.shape[2]
        if q.shape[2] != total:
            old = (total - 1) // window * window
            first = (
                (mask[:, 0, -1, :total] == 0).int().argmax(-1) if mask is not None else torch.zeros(k.shape[0]).long()
            )
            where = (torch.arange(total)[None] - first[:, None]).clamp(min=0)
            cos, sin = (t[:, None] for t in rotary(v, where))
            keys = plan.tensors[f"site{module.layer_idx}.keys"]
            values = plan.tensors[f"site{module.layer_idx}.values"]
            thin = turned(reduced(turned(k, cos, sin, back=True), keys), cos, sin)
            k = torch.cat([thin[:, :, :old], k[:, :, old:]], 2)
            v = torch.cat([reduced(v, values)[:, :, :old], v[:, :, old:]], 2)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(2, 3) * scaling
        if mask is not None:
            scores = scores + mask[..., :total]
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).contiguous(), None

    name = f"factored_{id(model)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model


def options(plan, **more):
    return {"kv_compression": {"method": "cskv", "plan": plan, "window": WINDOW, **more}, "strict": True}


def test_generation_equals_the_factored_reference(plan):
    eager, fast = compiled("llama", options=options(plan))
    inputs = prompt(2, 41, padding=(0, 7))
    assert torch.equal(greedy(fast, inputs, 40), greedy(factored(eager, plan), inputs, 40))
    assert phases(fast) == ["prefill", "decode"]
    assert not torchaccel.report(fast).declines


def test_the_factors_matter(plan):
    eager, _ = compiled("llama")
    inputs = prompt(2, 41, padding=(0, 7))
    assert not torch.equal(greedy(factored(build("llama"), plan), inputs, 40), greedy(eager, inputs, 40))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi3"])
def test_full_density_is_exact_but_for_rounding_in_every_family(family):
    # Normed keys, biases and no rotary embedding, fused projections: D - 1 of D channels.
    eager, _ = compiled(family)
    batches = [prompt(2, 60, seed=1)]
    made = torchaccel.calibrate(eager, "cskv", batches, {"key_density": 0.95, "value_density": 1.0, "window": WINDOW})
    rank = next(x.shape[0] for name, x in made.tensors.items() if name.endswith("keys"))
    heads = made.model.sites[0].kv_heads
    assert rank == heads * 15 and not any(name.endswith("values") for name in made.tensors)
    fast = torchaccel.compile(build(family), gate=False, **options(made))
    ids = prompt(2, 40)["input_ids"]
    with torch.no_grad():
        theirs, ours = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        eager(ids, past_key_values=theirs, use_cache=True)
        fast(ids, past_key_values=ours, use_cache=True)
        token = prompt(2, 1, seed=7)["input_ids"]
        expected, got = (m(token, past_key_values=c).logits for m, c in ((eager, theirs), (fast, ours)))
    assert ours.layers[0].keys.kv_layout.format.rank == 15
    error = (got - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.15


def test_bytes_are_those_of_the_latents(plan):
    _, fast = compiled("llama", options=options(plan))
    cache = DynamicCache(config=fast.config)
    with torch.no_grad():
        fast(prompt(2, 500)["input_ids"], past_key_values=cache, use_cache=True)
    keys, values = (getattr(cache.layers[0], name).physical for name in ("keys", "values"))
    for storage, rank in ((keys, 8), (values, 12)):
        tail = (WINDOW + 1) * (16 + rank) * 4
        assert storage.buf.nbytes == 2 * 2 * (tail + storage.capacity * rank * 4)
    assert {id(layer.keys.physical.table) for layer in cache.layers} == {id(keys.table)}
    layers = sum(getattr(layer, name).physical.buf.nbytes for layer in cache.layers for name in ("keys", "values"))
    assert torchaccel.kv_bytes(cache) == layers + keys.table.nbytes
    dense = 3 * 2 * 2 * 2 * keys.capacity * 16 * 4
    assert layers < 0.75 * dense


def test_continuing_cropping_and_rows(plan):
    """Turns, chunks, crops and selected rows, against the reference that sees the same tokens."""
    eager, fast = compiled("llama", options=options(plan))
    reference = factored(eager, plan)
    ids = prompt(2, 90)["input_ids"]

    def run(model, crop, chunks, rows):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for at, end in chunks:
                out = model(ids[:, at:end], past_key_values=cache, use_cache=True)
            if crop:
                cache.crop(crop - chunks[-1][1])
                out = model(ids[:, crop : crop + 1], past_key_values=cache, use_cache=True)
            if rows is not None:
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
                out = model(ids[rows, 60:61], past_key_values=cache, use_cache=True)
        return out.logits[:, -1]

    chunks = [(0, 50), (50, 51), (51, 60)]
    torch.testing.assert_close(run(fast, None, chunks, None), run(reference, None, chunks, None), atol=2e-4, rtol=1e-3)
    # Within the exact window of the same block: the reference forgets, the cache opens nothing.
    torch.testing.assert_close(run(fast, 55, chunks, None), run(reference, 55, chunks, None), atol=2e-4, rtol=1e-3)
    rows = torch.tensor([1, 1, 0])
    torch.testing.assert_close(run(fast, None, chunks, rows), run(reference, None, chunks, rows), atol=2e-4, rtol=1e-3)
    # Across a block that is opened again its tokens stay as their latents give them.
    assert torch.isfinite(run(fast, 20, chunks, None)).all()


def test_beams_and_many_steps_need_no_further_graph(plan):
    eager, fast = compiled("llama", options=options(plan))
    inputs = prompt(2, 30, padding=(4, 0))
    assert greedy(fast, inputs, 512).shape == (2, 542)
    assert phases(fast) == ["prefill", "decode"]
    theirs = greedy(factored(eager, plan), inputs, 24, num_beams=3)
    assert torch.equal(greedy(fast, inputs, 24, num_beams=3), theirs)


def test_evicting_as_well_is_declined(plan):
    evicting = {"method": "tova", "tokens": 24}
    fast = torchaccel.compile(build("llama"), gate=False, kv_compression=[evicting, options(plan)["kv_compression"]])
    assert greedy(fast, prompt(1, 40), 4).shape == (1, 44)
    assert any("latents of all" in str(decline) for decline in torchaccel.report(fast).declines)


# ---- The calibration ---------------------------------------------------------------------------------------------


def test_worked_example():
    # W = diag(3, 1) and white inputs: one channel keeps [3, 2] as [3, 0].
    basis = basis_of(torch.diag(torch.tensor([9.0, 1.0]).double()), 1)
    torch.testing.assert_close(torch.tensor([3.0, 2.0]).double() @ basis.T @ basis, torch.tensor([3.0, 0.0]).double())


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_with_white_inputs_the_error_is_the_discarded_singular_tail(rank):
    weight = torch.randn(6, 8, dtype=torch.float64)
    basis = basis_of(weight @ weight.T, rank)
    tail = torch.linalg.svdvals(weight)[rank:].norm()
    torch.testing.assert_close((weight - basis.T @ basis @ weight).norm(), tail, atol=1e-6, rtol=1e-6)


def test_no_factors_of_that_rank_reconstruct_better():
    tokens = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    basis = basis_of(tokens.T @ tokens, 5)
    best = (tokens - tokens @ basis.T @ basis).square().sum()
    encode = torch.nn.Parameter((basis.T + 0.1 * torch.randn(12, 5, dtype=torch.float64)).contiguous())
    decode = torch.nn.Parameter(basis + 0.1 * torch.randn(5, 12, dtype=torch.float64))
    optimiser = torch.optim.LBFGS([encode, decode], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        error = (tokens - tokens @ encode @ decode).square().sum()
        error.backward()
        return error

    optimiser.step(loss)
    assert best <= loss() * (1 + 1e-9)


def test_padding_does_not_count():
    model, ids = build("llama"), prompt(2, 30, seed=3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    plain = torchaccel.calibrate(model, "cskv", [{"input_ids": ids, "attention_mask": mask}])
    other = ids.clone()
    other[0, :11] = 50
    same = torchaccel.calibrate(model, "cskv", [{"input_ids": other, "attention_mask": mask}])
    assert plain.digest == same.digest
    assert plain.digest != torchaccel.calibrate(model, "cskv", [ids]).digest
