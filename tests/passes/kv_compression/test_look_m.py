"""LOOK-M against masks over eager attention with merged tokens, and the worked examples of its specification."""

import dataclasses

import pytest
import torch
import transformers as hf
from torchaccel.passes.kv_compression.look_m import LookMPolicy

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.a6 import A6, prompt_of
from tests.passes.kv_compression.masked_reference import Rule, grouped, masked
from torchaccel.runtime.eviction import Budget, Prompt


class LookMRule(Rule):
    def __init__(self, images, hitters, recent, merging):
        self.images, self.hitters, self.recent, self.merging = images, hitters, recent, merging
        self.merged = {}

    def prompt(self, layer, q, k, v, weights, valid):
        score = grouped(weights.sum(2), k.shape[1]).sum(2)
        alive = torch.zeros(k.shape[:3], dtype=torch.bool)
        text = ~self.images & valid
        tokens = k.shape[2]
        certain = text.clone()
        certain[:, tokens - self.recent :] = True
        size = max(self.hitters + self.recent, int(certain.sum(1).max()))
        for row in range(k.shape[0]):
            for head in range(k.shape[1]):
                rest = (~certain[row] & valid[row]).nonzero().flatten()
                best = score[row, head][rest].topk(size - int(certain[row].sum())).indices
                alive[row, head] = certain[row]
                alive[row, head, rest[best]] = True
        self.merged[layer] = [self.merge(x, k, alive, valid) for x in (k, v)]
        return alive

    def merge(self, x, k, alive, valid):
        out = x.clone()
        for row in range(k.shape[0]):
            heads = []
            for head in range(k.shape[1]):
                keep = alive[row, head].nonzero().flatten()
                unit = k[row, head].float()
                unit = unit / unit.norm(dim=-1, keepdim=True)
                gone = (~alive[row, head] & valid[row]).nonzero().flatten().tolist()
                heads.append({e: (unit[keep] @ unit[e]).max(0) for e in gone} | {"keep": keep})
            alike = [{e: float(found.values) for e, found in h.items() if e != "keep"} for h in heads]
            every = [s for h in alike for s in h.values()]
            for head, found in enumerate(heads):
                into = {int(t): [x[row, head, t].float()] for t in found["keep"]}
                for e, sim in alike[head].items():
                    target = int(found["keep"][found[e].indices])
                    source = x[row, head, e].float()
                    if self.merging == "pivot":
                        source = (source + x[row, head, target].float()) / 2
                    if self.merging == "weighted":
                        of_token = [h[e] for h in alike if e in h]
                        if sum(of_token) / len(of_token) < sum(every) / len(every):
                            continue
                        source = sim * source
                    into[target].append(source)
                for target, sources in into.items():
                    out[row, head, target] = torch.stack(sources).mean(0).to(x.dtype)
        return out

    def stored(self, layer, k, v):
        return [torch.cat([old, x[:, :, old.shape[2] :]], 2) for old, x in zip(self.merged[layer], (k, v), strict=True)]


def images_of(inputs):
    ids = inputs["input_ids"]
    return ((ids >= 50) & (ids <= 90)) | (ids == 95)


@pytest.mark.parametrize(("merging", "tokens"), [("average", 48), ("pivot", 48), ("weighted", 48), ("pivot", 20)])
def test_generation_equals_the_masked_reference(merging, tokens):
    method = {"method": "look_m", "tokens": tokens, "image_tokens": [[50, 90], 95], "merge": merging}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 60, padding=(0, 7))
    reference = masked(eager, LookMRule(images_of(inputs), tokens // 2, tokens // 2, merging))
    assert torch.equal(greedy(fast, inputs, 40), greedy(reference, inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


def llava():
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, image_seq_length=16)
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.08)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def test_a_model_with_images_tells_by_itself_which_tokens_they_are():
    inputs = prompt(2, 40, padding=(0, 5))
    inputs["input_ids"][:, 8:24] = 98
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    method = {"method": "look_m", "tokens": 30, "recent": 0.2}
    fast = torchaccel.compile(llava(), kv_compression=method, gate=False, strict=True)
    made = greedy(fast, inputs, 20)
    eager = llava()
    rule = LookMRule(inputs["input_ids"] == 98, 24, 6, "pivot")
    masked(eager.model.language_model, rule)
    assert torch.equal(made, greedy(eager, inputs, 20))
    assert {site.layout for record in torchaccel.report(fast).records for site in record.sites} >= {"dense LookMPolicy"}


def test_text_alone_and_budgets_beyond_the_prompt_are_exact():
    inputs = prompt(2, 42, padding=(5, 0))
    for method in ({"tokens": 10, "image_tokens": 99}, {"tokens": 999, "image_tokens": [[3, 90]]}):
        eager, fast = compiled("llama", options={"kv_compression": {"method": "look_m", **method}, "strict": True})
        assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_without_a_sign_of_images_the_method_says_so():
    _, fast = compiled("llama", options={"kv_compression": "look_m", "strict": True})
    with pytest.raises(Exception, match="give their ids as image_tokens"):
        greedy(fast, prompt(1, 9), 2)


K = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [0.96, 0.28], [0, 2]])
V = torch.arange(1.0, 7.0)[:, None].expand(6, 2)


@pytest.mark.parametrize(
    ("merging", "keys", "values"),
    [
        ("none", [(1, 0), (0, 1), (0, 2)], [1, 2, 6]),
        ("average", [(0.92, 0.29333), (0.3, 0.9), (0, 2)], [3.3333, 2.5, 6]),
        ("pivot", [(0.96, 0.14667), (0.15, 0.95), (0, 2)], [2.16667, 2.25, 6]),
        ("weighted", [(0.9608, 0.1344), (0, 1), (0, 2)], [2.9, 2, 6]),
    ],
)
def test_worked_example_of_merging(merging, keys, values):
    valid = torch.ones(1, 6, dtype=torch.bool)
    first = Prompt(K[None, None, :0], K[None, None], V[None, None], None, valid, 1.0, 0, 1, 8.0)
    merged = LookMPolicy(Budget(tokens=3), merging=merging).merge(first, torch.tensor([[[0, 1, 5]]]))
    expected = torch.tensor(keys, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(merged[0][0, 0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(merged[1][0, 0], expected[1][:, None].expand(3, 2), atol=1e-4, rtol=0)
    values_alone = LookMPolicy(Budget(tokens=3), merging=merging, merge_keys=False)
    assert torch.equal(values_alone.merge(first, torch.tensor([[[0, 1, 5]]]))[0][0, 0], K[[0, 1, 5]])


def test_padding_is_merged_into_nothing_and_nothing_into_it():
    valid = torch.tensor([[False, True, True, True, True, True]])
    first = Prompt(K[None, None, :0], K[None, None], V[None, None], None, valid, 1.0, 0, 1, 8.0)
    kept = torch.tensor([[[0, 1, 5]]])
    _, values = LookMPolicy(Budget(tokens=3), merging="average").merge(first, kept)
    # Tokens 2, 3 and 4 go to token 1: the padding, to which 3 and 4 are nearer, gets nothing.
    torch.testing.assert_close(values[0, 0, :, 0], torch.tensor([1.0, 3.5, 6.0]))


def test_text_before_recent_before_attention():
    ids = torch.tensor([[7, 7, 1, 7, 7, 7]])
    first = dataclasses.replace(prompt_of(A6), ids=ids)
    policy = LookMPolicy(Budget(tokens=3), recent=1 / 3, image_ids=(7,))
    assert policy.keep(first).tolist() == [[[0, 2, 5]]]
    crowded = dataclasses.replace(first, ids=torch.tensor([[1, 7, 1, 1, 1, 7]]))
    assert policy.keep(crowded).tolist() == [[[0, 2, 3, 4, 5]]] and policy.capacity(crowded) == 5
    plain = LookMPolicy(Budget(tokens=3), recent=1 / 3, text_prior=False, sinks=1)
    assert plain.keep(prompt_of(A6)).tolist() == [[[0, 1, 5]]]
