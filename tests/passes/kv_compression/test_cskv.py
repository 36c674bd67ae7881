"""CSKV against factors applied to the cache of eager attention, written from the publication; bytes; other caches."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
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
