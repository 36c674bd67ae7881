"""Video-XL's bi-level cache against masks over eager attention with pooled tokens, and what its specification says."""

import dataclasses

import pytest
import torch
from torchaccel.passes.kv_compression.video_xl import VideoXLPolicy
from transformers import DynamicCache

from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.masked_reference import Rule, masked
from torchaccel.runtime.eviction import Budget, Prompt


class VideoRule(Rule):
    """images: bool ``[B, S]`` or None for pooling everything. again: every call of several tokens chooses anew."""

    def __init__(self, tokens, chunk, compression, window, images=None, again=False):
        self.tokens, self.chunk, self.compression, self.window = tokens, chunk, compression, window
        self.images, self.again = images, again
        self.held, self.fresh, self.changed = {}, {}, False

    def prompt(self, layer, q, k, v, weights, valid):
        self.valid, self.scale, self.length = valid, q.shape[-1] ** -0.5, k.shape[2]
        return self.choose(layer, q[:, :, -self.window :], k, v)

    def choose(self, layer, q, k, v):
        alive = torch.zeros(k.shape[0], k.shape[1], self.length, dtype=torch.bool)
        held = k[:, :, : self.length].clone(), v[:, :, : self.length].clone()
        group = q.shape[1] // k.shape[1]
        for row in range(k.shape[0]):
            real = self.valid[row].nonzero().flatten().tolist()
            image = [self.images is None or bool(self.images[row, c]) for c in real]
            chunks = [real[i : i + self.chunk] for i in range(0, len(real), self.chunk)]
            groups = self.groups(real, image)
            for head in range(k.shape[1]):
                means = torch.stack([k[row, head, c].float().mean(0) for c in chunks])
                asking = q[row, head * group : (head + 1) * group].float()
                share = (asking @ means.mT * self.scale).softmax(-1).mean((0, 1))
                order = [len(chunks) - 1, 0, 1, *share.argsort(descending=True).tolist()]
                kept = set(real[-self.window :]) | {g[-1] for g in groups}
                kept |= {c for c, is_image in zip(real, image, strict=True) if not is_image}
                assert len(kept) <= self.tokens
                for column in (c for number in order for c in chunks[number]):
                    if len(kept) < self.tokens:
                        kept.add(column)
                alive[row, head, sorted(kept)] = True
                for members in groups:
                    waiting = []
                    for column in members:
                        waiting.append(column)
                        if column in kept:
                            for x, out in zip((k, v), held, strict=True):
                                out[row, head, column] = x[row, head, waiting].float().mean(0).to(x.dtype)
                            waiting = []
        self.changed = self.changed or (layer in self.held and not torch.equal(held[0], self.held[layer][0]))
        self.held[layer] = held
        return alive

    def groups(self, real, image):
        found = []
        for place, column in enumerate(real):
            new = place % self.chunk == 0 or not image[place] or not image[place - 1]
            if new or len(found[-1]) == self.compression:
                found.append([])
            found[-1].append(column)
        return found

    def asked(self, layer, q, k, v):
        self.fresh[layer] = (q[:, :, -self.window :], k, v) if q.shape[2] > 1 and self.again else None

    def step(self, layer, weights, alive):
        if self.fresh[layer] is None:
            return alive
        return torch.cat([self.choose(layer, *self.fresh[layer]), alive[..., self.length :]], 2)

    def stored(self, layer, k, v):
        return [torch.cat([old, x[:, :, self.length :]], 2) for old, x in zip(self.held[layer], (k, v), strict=True)]


@pytest.mark.parametrize("image_tokens", [None, [[20, 98]]])
def test_generation_equals_the_masked_reference(image_tokens):
    sizes = {"tokens": 44, "chunk": 10, "compression": 4, "window": 4}
    method = {"method": "video_xl", "image_tokens": image_tokens, **sizes}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 60, padding=(0, 7))
    rule = VideoRule(**sizes, images=inputs["input_ids"] >= 20 if image_tokens else None)
    assert torch.equal(greedy(fast, inputs, 40), greedy(masked(eager, rule), inputs, 40))
    assert phases(fast) == ["prefill", "decode"]


@pytest.mark.parametrize("again", [False, True])
def test_every_question_chooses_anew(again):
    sizes = {"tokens": 30, "chunk": 6, "compression": 3, "window": 3}
    method = {"method": "video_xl", "restore": again, **sizes}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    rule = VideoRule(**sizes, again=again)
    masked(eager, rule)
    inputs = prompt(2, 60, padding=(0, 7))
    logits = []
    for model in (fast, eager):
        cache, made, first = DynamicCache(), [], 0
        for count in (42, 1, 1, 1, 6, 1, 1, 1, 6):
            last = first + count
            arguments = {
                "attention_mask": inputs["attention_mask"][:, :last],
                "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, first:last],
            }
            with torch.no_grad():
                made.append(model(inputs["input_ids"][:, first:last], past_key_values=cache, **arguments).logits[:, -1])
            first = last
        logits.append(torch.stack(made))
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    assert rule.changed == again


def alone(tokens, queries=1):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    asking = torch.randn(1, 4, queries, 8, generator=generator)
    return Prompt(asking, keys, values, None, torch.ones(1, tokens, dtype=torch.bool), 8**-0.5, 0, 1, 8.0)


def test_frames_are_pooled_by_four():
    """400 frames in groups of four with 144 tokens each."""
    first = alone(14400)
    policy = VideoXLPolicy(Budget(tokens=3600), chunk=576, compression=4, window=1)
    kept = policy.keep(first)
    # The newest token is the last of its group: nothing but the pooled tokens fits.
    assert kept.shape == (1, 2, 3600) and torch.equal(kept[0, 0], torch.arange(3, 14400, 4))
    keys, values = policy.merge(first, kept)
    torch.testing.assert_close(keys, first.keys.unflatten(2, (3600, 4)).mean(3))
    constant = dataclasses.replace(first, values=torch.ones_like(first.values))
    assert torch.equal(policy.merge(constant, kept)[1], torch.ones_like(values))


def test_the_chunk_that_is_asked_for_is_dense():
    first = alone(80)
    first.keys[:, 0, 30:40] = 5 * first.queries[:, 0]  # chunk 3 of 8, for the first KV head
    first.keys[:, 1, 50:60] = 5 * first.queries[:, 2]
    first = dataclasses.replace(first, queries=first.queries[:, [0, 0, 2, 2]])
    policy = VideoXLPolicy(Budget(tokens=20 + 4 * 6 + 4 * 2), chunk=10, compression=5, window=1)
    kept = policy.keep(first)
    dense = [[c for c in range(8) if (kept[0, h] // 10 == c).sum() == 10] for h in range(2)]
    assert dense == [[0, 1, 3, 7], [0, 1, 5, 7]]


def test_no_compression_and_budgets_beyond_the_prompt_are_exact():
    inputs = prompt(2, 42, padding=(5, 0))
    for method in ({"tokens": 999}, {"tokens": 42, "compression": 1}):
        eager, fast = compiled("llama", options={"kv_compression": {"method": "video_xl", **method}, "strict": True})
        assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def test_budgets_below_the_pooled_prompt_keep_the_newest_and_pool_more():
    first = alone(40)
    kept = VideoXLPolicy(Budget(tokens=6), chunk=10, compression=4, window=3).keep(first)
    assert kept.shape[2] == 6 and kept[0, 0, -3:].tolist() == [37, 38, 39]
    assert torch.equal(VideoXLPolicy(Budget(tokens=2), window=4).keep(first)[0, 1], torch.tensor([38, 39]))
