"""ZipCache against its algorithm over the cache of eager attention, written from the publication; worked examples."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.passes.kv_compression.kivi_reference import quantised

RATIO, INTERVAL = 0.4, 20
BLOCK = 64


class Reference:
    """Attention over the tokens that ZipCache would hold; one sequence of calls, from its prompt on.

    All queries of the prompt are probes here: which others are drawn is the implementation's business.
    """

    def __init__(self, high, low):
        self.bits, self.layers = (high, low), {}

    def sort(self, p, valid):
        """Tokens of the two classes, each ascending: of equal ones the earlier is low."""
        p = p.masked_fill(~valid[:, None], -torch.inf)
        order, low = p.argsort(-1, stable=True), int(RATIO * p.shape[-1])
        return order[..., low:].sort(-1).values, order[..., :low].sort(-1).values

    def read(self, layer, k, v):
        """What the cache reads of all keys and values ``[B, H, S, D]``, sorted or not."""
        state = self.layers[layer]
        k, v = k.clone(), v.clone()
        for bits, members in zip(self.bits, state["members"], strict=True):
            done = members.shape[-1] // BLOCK * BLOCK
            if bits == 16 or not done:
                continue
            where = members[..., :done, None].expand(-1, -1, -1, k.shape[3])
            keys = state["keys"].gather(2, where).unflatten(2, (-1, BLOCK)).transpose(3, 4)
            k.scatter_(2, where, quantised(keys, BLOCK, bits).transpose(3, 4).flatten(2, 3))
            v.scatter_(
                2,
                where,
                quantised((state["values"] / state["scale"]).gather(2, where), v.shape[3], bits) * state["scale"],
            )
        return k, v

    def __call__(self, module, q, k, v, mask, scaling, **_):
        layer, tokens, group = module.layer_idx, k.shape[2], q.shape[1] // k.shape[1]
        prompted = q.shape[2] == tokens
        read_k, read_v = (k, v) if prompted else self.read(layer, k, v)
        wide_k, wide_v = read_k.repeat_interleave(group, 1), read_v.repeat_interleave(group, 1)
        scores = q @ wide_k.transpose(2, 3) * scaling
        if mask is not None:
            scores = scores + mask[..., :tokens]
        weights = torch.softmax(scores, -1)
        out = (weights @ wide_v).transpose(1, 2).contiguous(), None
        grouped = lambda x: x.unflatten(1, (-1, group)).sum(2)  # noqa: E731
        if prompted:
            valid = torch.ones(k.shape[0], tokens, dtype=torch.bool)
            if mask is not None:
                valid = (mask[:, 0, -1, :tokens] == 0).expand(k.shape[0], -1)
            seen = torch.ones(tokens, tokens).tril() * valid[:, None] * valid[..., None]
            p = grouped((weights * seen[:, None]).sum(2)) / seen.sum(1).clamp(min=1)[:, None]
            scale = v.abs().masked_fill(~valid[:, None, :, None], 0).amax(2, keepdim=True).sqrt().clamp(min=1e-4)
            keys, values = (torch.where(valid[:, None, :, None], x, x[:, :, -1:]) for x in (k, v))
            self.layers[layer] = {
                "members": self.sort(p, valid),
                "count": tokens,
                "scale": scale,
                "keys": keys,
                "values": values,
            }
            return out
        state = self.layers[layer]
        count = state["count"]
        state["keys"] = torch.cat([state["keys"], k[:, :, state["keys"].shape[2] :]], 2)
        state["values"] = torch.cat([state["values"], v[:, :, state["values"].shape[2] :]], 2)
        if tokens - count >= INTERVAL:
            tail = torch.softmax(
                q[:, :, -1:] @ k[:, :, count:].repeat_interleave(group, 1).transpose(2, 3) * scaling, -1
            )
            new = self.sort(grouped(tail.squeeze(2)), torch.ones(k.shape[0], tokens - count, dtype=torch.bool))
            state["members"] = [torch.cat([old, x + count], -1) for old, x in zip(state["members"], new, strict=True)]
            state["count"] = tokens
        return out


def referred(model, reference):
    name = f"zipcache_{id(reference)}"
    AttentionInterface.register(name, reference)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model


def options(**more):
    # All queries are probes.
    given = {"method": "zipcache", "ratio": RATIO, "interval": INTERVAL, "recent": 1.0, "random": 0.0, **more}
    return {"kv_compression": given, "strict": True}


@pytest.mark.parametrize(("high", "low"), [(4, 2)])
def test_generation_equals_the_reference(high, low):
    eager, fast = compiled("llama", options=options(high_bits=high, low_bits=low))
    inputs = prompt(2, 230, padding=(0, 9))
    expected = greedy(referred(eager, Reference(high, low)), inputs, 70)
    assert torch.equal(greedy(fast, inputs, 70), expected)
    assert phases(fast) == ["prefill", "decode"]
    assert not torchaccel.report(fast).declines
