"""ZipCache against its algorithm over the cache of eager attention, written from the publication; worked examples."""

import pytest
import torch
from torchaccel.kernels.spec import KVFormat
from torchaccel.passes.kv_compression.zipcache import ZipCachePolicy, attention, formats
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import torchaccel
from tests.e2e.generation import compiled, greedy, phases, prompt
from tests.models.families import build
from tests.passes.kv_compression.kivi_reference import quantised
from torchaccel.runtime.eviction import Prompt
from torchaccel.runtime.mixing import channel_scale

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
        order, low = p.argsort(dim=-1, stable=True), int(RATIO * p.shape[-1])
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


def test_sorting_later_turns_crops_and_rows():
    """More than the exact tail, after turns, selected rows and crops: logits of the reference on the same tokens."""
    eager, fast = compiled("llama", options=options())
    reference = referred(eager, Reference(4, 2))
    ids = prompt(2, 260)["input_ids"]

    def run(model, chunks):
        cache, out = DynamicCache(config=model.config), None
        with torch.no_grad():
            for at, end in chunks:
                out = model(ids[:, at:end], past_key_values=cache, use_cache=True)
        return out.logits[:, -1], cache

    # The second turn is longer than the interval, so it is sorted, by its last query.
    chunks = [(0, 200), (200, 225), (225, 226), (226, 240)]
    expected, _ = run(reference, chunks)
    got, cache = run(fast, chunks)
    # A code here and there is rounded the other way; what compression changes is far more.
    assert (got - expected).abs().max() < 3e-3 < 0.05 * (run(build("llama"), chunks)[0] - expected).abs().max()
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert [part.filled for part in keys.physical.classes] == [135, 90] and keys.end == 15
    tensors = [t for s in (keys.physical, values.physical) for t in (s.buf, s.positions, s.scale)]
    tensors += [t for s in (keys.physical, values.physical) for p in s.classes for t in (p.buf, p.positions)]
    own = sum(t.nbytes for t in tensors if t is not None)
    assert torchaccel.kv_bytes([keys, values]) == own
    # Tokens are in the order of their columns again when the cache is read back, whatever their class.
    dense = keys.dense()
    assert dense.shape == (2, 2, 240, 16) and torch.equal(dense[:, :, 225:], keys.physical.buf[:, :, :15])
    whole = (dense - run(reference, chunks)[1].layers[0].keys).abs().amax((0, 1, 3))
    assert (whole[225:] < 1e-4).all() and whole.max() < 3.0
    # Rows are selected with their classes; a crop into the classes lets all that is left wait to be sorted anew.
    row = torch.tensor([1])
    assert torch.equal(keys.index_select(0, row).dense(), dense[1:])
    assert torch.equal(keys[:, :, :235].dense(), dense[:, :, :235])
    torch.testing.assert_close(keys[:, :, :100].dense(), dense[:, :, :100])
    torch.testing.assert_close(values[:, :, :100].dense(), values.dense()[:, :, :100])
    with torch.no_grad():
        cache.crop(100 - 240)
        assert torch.isfinite(fast(ids[:, 100:101], past_key_values=cache, use_cache=True).logits).all()
    assert phases(fast) == ["prefill", "extend", "decode"]


def test_everything_in_full_precision_is_exact_and_needs_no_further_graph():
    eager, fast = compiled("llama", options=options(high_bits=16, ratio=0.0, random=0.05, recent=0.05))
    inputs = prompt(2, 40, padding=(0, 9))
    assert torch.equal(greedy(fast, inputs, 150), greedy(eager, inputs, 150))
    assert phases(fast) == ["prefill", "decode"]


# ---- Worked examples ---------------------------------------------------------------------------------------------


def prompt_of(weights, valid=None):
    """A prompt whose one head attends by these softmax weights ``[S, S]``."""
    size = weights.shape[0]
    q, k = weights.clamp(min=1e-12).log()[None, None], torch.eye(size)[None, None]
    valid = torch.ones(1, size, dtype=torch.bool) if valid is None else valid
    return Prompt(q, k, k, None, valid, 1.0, 0, 1, 0.0)


def policy(ratio=0.4, **more):
    fmt = KVFormat("dense", "float32", 4)
    return ZipCachePolicy((fmt, fmt), (fmt, fmt), ratio, 100, **more)


A = torch.tensor([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.2, 0.1, 0.7, 0], [0.1, 0.1, 0.5, 0.3]])


def test_normalised_attention_finds_another_token():
    rows = torch.arange(4)[None]
    received, seen = attention(prompt_of(A), rows, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(received[0, 0], torch.tensor([1.9, 0.6, 1.2, 0.3]), atol=1e-5, rtol=0)
    assert seen.tolist() == [[4.0, 3.0, 2.0, 1.0]]
    scores = policy(recent=1.0).score(prompt_of(A))
    torch.testing.assert_close(scores[0, 0], torch.tensor([0.475, 0.2, 0.6, 0.3]), atol=1e-5, rtol=0)
    high, low = policy(0.5, recent=1.0).sort(prompt_of(A))
    assert high.tolist() == [[[0, 2]]] and low.tolist() == [[[1, 3]]]


def test_padding_neither_votes_nor_matters():
    valid = torch.tensor([[False, True, True, True]])
    scores = policy(recent=1.0).score(prompt_of(A, valid))
    expected = torch.stack([row.masked_fill(~valid[0], 0) / row[1:].sum() for row in A[1:]])
    counts = torch.tensor([1.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(scores[0, 0], expected.sum(0) / counts, atol=1e-5, rtol=0)
    _, low = policy(0.25, recent=1.0).sort(prompt_of(A, valid))
    assert low.tolist() == [[[0]]]


@pytest.mark.parametrize(("tokens", "last", "others"), [(200, 10, 10), (3, 1, 0)])
def test_probes_are_the_last_queries_and_others_that_are_no_padding(tokens, last, others):
    weights = torch.rand(tokens, tokens).tril()
    valid = torch.arange(tokens)[None] >= 1
    chosen, real = policy().probes(prompt_of(weights, valid))
    assert chosen[0, :last].tolist() == list(range(tokens - last, tokens)) and real.all()
    rest = chosen[0, last:].tolist()
    assert len(set(rest)) == others and all(1 <= row < tokens - last for row in rest)
    again, _ = policy().probes(prompt_of(weights, valid))
    assert torch.equal(chosen, again)


def test_values_are_divided_by_a_scale_for_each_channel():
    values = torch.tensor([[1.0, -2.0, 64.0, 4.0], [2.0, 1.0, -100.0, 1.0]])[None, None]
    scale = channel_scale(values, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(scale[0, 0, 0], torch.tensor([1.41421, 1.41421, 10.0, 2.0]), atol=1e-5, rtol=0)
    read = quantised(values / scale, 4, 4) * scale
    expected = torch.tensor([[0.94692, -2.0, 64.0, 4.46484], [2.0, 0.92386, -100.0, 1.30653]])
    torch.testing.assert_close(read[0, 0], expected, atol=0, rtol=0.02)  # float16 scales
    zero = channel_scale(torch.zeros(1, 1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    assert torch.isfinite(torch.zeros(4) / zero).all()


def test_formats_of_the_classes():
    keys, values = formats(4, "bfloat16", 64)
    assert (keys.kind, keys.axis, keys.group_size) == ("int4", "channel", 64)
    assert (values.kind, values.axis, values.group_size) == ("int4", "token", 64)
    assert formats(16, "float32", 64)[0].kind == "dense"
