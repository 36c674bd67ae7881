"""Double Sparsity against a mask over eager attention, its calibration, and the worked example of its specification."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.models.families import build
from tests.passes.listed_reference import Lister, listing
from tests.runtime.test_adoption import continued, plain_cache
from torchaccel.errors import OptionsError
from torchaccel.options import resolve
from torchaccel.runtime.labels import LabelSelection
from torchaccel.runtime.selection import Call, Selection, Sizes

TOKENS, KEPT = 40, 4


class LabelRule(Lister):
    """Scores by a few channels, row by row and head by head; ``channels[layer][kv head]``, or the prompt's largest."""

    def __init__(self, tokens, kept, channels=None):
        self.tokens, self.kept, self.channels, self.given = tokens, kept, channels or {}, channels is not None

    def prompt(self, layer, q, k, weights, valid):
        if not self.given:
            rows = [k[b][:, valid[b]].abs().mean(1) for b in range(k.shape[0])]
            self.channels[layer] = [[head.topk(self.kept).indices for head in row] for row in rows]

    def step(self, layer, q, k, valid):
        batch, kv_heads, tokens, _ = k.shape
        chosen = torch.zeros(batch, kv_heads, tokens, dtype=torch.bool)
        for b, h in torch.ones(batch, kv_heads).nonzero().tolist():
            own = self.channels[layer][h][: self.kept] if self.given else self.channels[layer][b][h]
            queries = q[b].unflatten(0, (kv_heads, -1))[h, :, 0][:, own]
            scores = (queries @ k[b, h][:, own].T).amax(0).masked_fill(~valid[b], -torch.inf)
            scores[-1] = torch.inf
            best = scores.sort(descending=True, stable=True).indices[: self.tokens]
            chosen[b, h, best] = True
        return chosen


def method(**more):
    dim = build("llama").config.head_dim
    return {"method": "double_sparsity", "tokens": TOKENS, "density": KEPT / dim, "dense_layers": 0, **more}


@pytest.fixture(scope="module")
def plan():
    return torchaccel.calibrate(build("llama"), "double_sparsity", [prompt(2, 60, padding=(0, 9), seed=5)])


@pytest.mark.parametrize(("padding", "calibrated"), [((0, 0), False), ((0, 21), False), ((0, 21), True)])
def test_generation_equals_the_masked_reference(padding, calibrated, plan):
    options = method(plan=plan) if calibrated else method()
    eager, fast = compiled("llama", options={"sparse_attention": options, "strict": True})
    inputs = prompt(2, 123, padding=padding)
    exact = greedy(eager, inputs, 64)
    sites = len(plan.model.sites)
    channels = {site: plan.tensors[f"site{site}.channels"].long() for site in range(sites)} if calibrated else None
    found = greedy(listing(eager, LabelRule(TOKENS, KEPT, channels)), inputs, 64)
    assert torch.equal(greedy(fast, inputs, 64), found) and not torch.equal(found, exact)
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)


def test_a_budget_that_covers_everything_is_exact():
    eager, fast = compiled("llama", options={"sparse_attention": method(tokens=512)})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_all_channels_find_the_best_tokens():
    """With whole keys as labels, and queries of one head, what is left out has less weight than what is read."""
    policy = LabelSelection(7, 8, 8)
    state = policy.allocate(Sizes(2, 3, 64, 8, torch.float32), torch.device("cpu"))
    keys, q = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 1, 8)
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    listed = policy.choose(state, Call(q, keys[:, :, :0], torch.tensor([0, 50, 50])))
    scores = (q @ keys.transpose(2, 3))[:, :, 0]
    scores[..., -1] = torch.inf
    assert torch.equal(listed.long(), scores.topk(7).indices.sort(-1).values)


def test_plain_caches_are_continued():
    """Labels, and the channels of each row, are made from the keys that come in."""
    eager, fast = compiled("llama", options={"sparse_attention": method(), "strict": True})
    inputs, rule = prompt(2, 123, padding=(0, 42)), LabelRule(TOKENS, KEPT)
    given = [plain_cache(eager, inputs) for _ in range(2)]
    for index, layer in enumerate(given[0].layers):
        rule.prompt(index, None, layer.keys, None, inputs["attention_mask"].bool())
    expected, _ = continued(listing(eager, rule), inputs, given[0], [1] * 10)
    found, _ = continued(fast, inputs, given[1], [1] * 10)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert all_lowered(fast)


@pytest.mark.parametrize("payload", ["int8", {"method": "int4", "window": 256}])
def test_quantised_caches_keep_labels_of_what_came_in(payload):
    """int8 reads codes, so tokens may differ once; int4 has everything in its window of full precision still."""
    options = {"sparse_attention": method(), "kv_compression": payload, "strict": True}
    reference, fast = compiled("llama", options=options)
    inputs = prompt(2, 123, padding=(0, 21))
    found, expected = (greedy(m, inputs, 30) for m in (fast, listing(reference, LabelRule(TOKENS, KEPT))))
    assert all_lowered(fast)
    same = 123 + (8 if payload == "int8" else 30)
    assert torch.equal(found[:, :same], expected[:, :same])


def test_turns_crops_and_chunks_equal_the_reference(plan):
    """Labels follow the keys; the first chunk of the second row is nothing but padding."""
    channels = {site: plan.tensors[f"site{site}.channels"].long() for site in range(len(plan.model.sites))}
    eager, fast = compiled("llama", options={"sparse_attention": method(plan=plan)})
    reference = listing(eager, LabelRule(TOKENS, KEPT, channels))
    inputs = prompt(2, 120, padding=(0, 41))
    assert torch.equal(greedy(fast, inputs, 24, prefill_chunk_size=32), greedy(reference, inputs, 24))

    def turns(model):
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            for seed, step in enumerate([101, 1, 1, 30, 1, -43, 1, *[1] * 9, -3, 7, 1]):
                if step < 0:
                    cache.crop(step)
                else:
                    ids = prompt(2, step, seed=seed)["input_ids"]
                    found.append(model(ids, past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.stack(found)

    torch.testing.assert_close(turns(fast), turns(reference), atol=2e-4, rtol=0)


def test_padding_has_no_say_in_a_rows_channels():
    """A prompt in chunks whose first one is padding: channels are of the first chunk with tokens."""
    policy = LabelSelection(5, 3, 12)
    state = policy.allocate(Sizes(2, 2, 64, 12, torch.float32), torch.device("cpu"))
    keys = torch.randn(2, 2, 40, 12) * torch.rand(2, 2, 1, 12)
    keys[1, :, :21] *= 100 * torch.rand(12)
    state["first"].copy_(torch.tensor([0, 21]))
    for begin, end in ((0, 16), (16, 40)):
        part = keys[:, :, begin:end]
        policy.append(state, Call(part, part, torch.tensor([0, begin, begin])))
    expected = [keys[0, :, :16].abs().mean(1), keys[1, :, 21:].abs().mean(1)]
    assert torch.equal(state["channels"].long(), torch.stack(expected).topk(3).indices)
    labels = keys.gather(3, state["channels"].long()[:, :, None].expand(-1, -1, 40, -1))
    assert torch.equal(state["labels"][0, :, :40], labels[0])
    assert torch.equal(state["labels"][1, :, 21:40], labels[1, :, 21:])
    again = policy.allocate(Sizes(2, 2, 64, 12, torch.float32), torch.device("cpu"))
    again["first"].copy_(state["first"])
    policy.restore(again, lambda lo, hi: keys[:, :, lo:hi], 0, 40)
    assert torch.equal(again["channels"][1], state["channels"][1])


def test_worked_example():
    """K rows and q of the specification: channels {0, 2}, tokens {0, 2, 4}."""
    keys = torch.tensor([(1, 0, 2, 0), (0, 1, 0, 1), (2, 1, -1, 0), (0, 0, 1, 3), (1, 1, 1, 1), (-1, 0, 0, 2)]).float()
    keys, q = keys[None, None], torch.tensor([2, 0, 1, 0.5])[None, None, None]
    size = (q[0, 0] * keys[0, 0]).abs().mean(0)
    torch.testing.assert_close(size, torch.tensor([1.6667, 0, 0.8333, 0.5833]), atol=1e-4, rtol=0)
    policy = LabelSelection(4, 2, 4, ((0, 2),))
    assert Selection.from_key(policy.key()) == policy
    state = policy.allocate(Sizes(1, 1, 8, 4, torch.float32), torch.device("cpu"))
    policy.append(state, Call(keys, keys, torch.zeros(3, dtype=torch.int64)))
    # The newest token is read anyway, and is one of the entries.
    assert policy.choose(state, Call(q, keys[:, :, :0], torch.tensor([0, 6, 6]))).tolist() == [[[0, 2, 4, 5]]]


@pytest.mark.parametrize("ranking", ["qk", "q", "k"])
def test_calibration_ranks_by_all_text(ranking):
    """Against queries and keys that eager attention is shown, over two batches, without their padding."""
    model, seen = build("llama"), {}
    group = model.config.num_attention_heads // model.config.num_key_value_heads

    def attention(module, q, k, v, mask, scaling, **_):
        valid = (
            torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
            if mask is None
            else torch.stack([(row[0].diagonal() == 0) for row in mask])
        )
        if ranking != "qk":
            rotary = model.model.rotary_emb
            where = torch.arange(q.shape[2])[None]
            cos, sin = (t[:, None] for t in rotary(v, where))
            q, k = (
                x * cos - torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin for x in (q, k)
            )
        wide = k.repeat_interleave(group, 1)
        sizes = {"qk": q * wide, "q": q, "k": wide}[ranking].abs().transpose(1, 2)[valid].sum(0)
        sizes = sizes.unflatten(0, (-1, group)).sum(1)
        seen[module.layer_idx] = seen.get(module.layer_idx, 0) + sizes
        return torch.zeros_like(q).transpose(1, 2), None

    AttentionInterface.register("ranking", attention)
    AttentionMaskInterface.register("ranking", eager_mask)
    batches = [prompt(2, 50, padding=(0, 9), seed=1), prompt(2, 30, seed=2)]
    made = torchaccel.calibrate(build("llama"), "double_sparsity", batches, {"ranking": ranking})
    model.set_attn_implementation("ranking")
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    # Layer 0 alone: the replaced attention gives zeros, so that later layers are shown something else.
    assert torch.equal(made.tensors["site0.channels"].long(), seen[0].argsort(-1, descending=True))
    assert made.options["ranking"] == ranking


def test_options_are_checked(plan):
    for wrong in ({"density": 0}, {"tokens": 0}, {"ranking": "v"}, {"plan": plan, "ranking": "k"}):
        with pytest.raises(OptionsError, match=list(wrong)[-1]):
            resolve({"sparse_attention": {"method": "double_sparsity", **wrong}})
