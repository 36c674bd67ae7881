"""Methods that have kernels or state of their own in bfloat16: padded rows, grouped heads, 16 tokens."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import torchaccel
from tests.e2e.generation import greedy, phases, prompt
from tests.models.families import build

# Whole blocks of 64 tokens leave full precision, of each class of tokens too.
LENGTH, STEPS = 170, 16
METHODS = {
    "zipcache": {"interval": 7, "ratio": 0.5},
    "cskv": {"window": 16},
    "adakv": {"tokens": 24, "scorer": {"method": "snapkv", "window": 6}},
    "duo_attention": {"retrieval_heads": {0: (1,)}, "sinks": 3, "recent": 9},
    "look_m": {"tokens": 24, "image_tokens": [[50, 98]]},
    "video_xl": {"tokens": 24, "chunk": 16, "window": 6},
    "sentence_kv": {"tokens": 20, "window": 6, "start": 3, "recent": 5, "ends": (7, 11), "longest": 9},
    "mpcache": {"ratio": 0.6, "dense_layers": 0},
    "quest": {"tokens": 32, "dense_layers": 0},
    "gear": {"window": 0},
    "turboquant": {},
}


class Dictated(LogitsProcessor):
    """Generates the tokens ``[B, n]`` it is given, so that models of different rounding see the same ones."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, ids, scores):
        forced = self.tokens[:, ids.shape[1] - LENGTH, None]
        return torch.full_like(scores, -torch.inf).scatter(1, forced, 0.0)


def model(dtype):
    """A model of one set of weights, which bfloat16 holds exactly."""
    return build("llama", layers=1, dtype=torch.bfloat16).to(dtype)


def logits(model, dictated):
    """Of every step of ``generate``, float32 ``[n, B, vocabulary]``."""
    found = greedy(
        model,
        prompt(2, LENGTH, padding=(0, 9)),
        STEPS,
        logits_processor=LogitsProcessorList([Dictated(dictated)]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits).float()


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_differs_from_float32_by_rounding(name):
    method = {"method": name, **METHODS[name]}
    if name == "cskv":
        method["plan"] = torchaccel.calibrate(model(torch.float32), "cskv", [prompt(2, 60)], METHODS[name])
    family = "sparse_attention" if name == "quest" else "kv_compression"
    options = {family: method, "strict": True, "gate": False}
    dictated = prompt(2, STEPS, seed=3)["input_ids"]
    exact, rounded = (logits(model(dtype), dictated) for dtype in (torch.float32, torch.bfloat16))
    noise = (rounded - exact).norm() / exact.norm()
    whole, half = (torchaccel.compile(model(dtype), **options) for dtype in (torch.float32, torch.bfloat16))
    truth, got = logits(whole, dictated), logits(half, dictated)
    assert phases(half) == ["prefill", "decode"]
    lost = (truth - exact).norm() / exact.norm()
    # Steps in which a near tie between blocks, or tokens, is decided otherwise differ by far: they are few.
    error = ((got - truth).norm(dim=-1) / truth.norm(dim=-1)).median()
    # Not so of codes of few bits: in every step some of them are rounded otherwise.
    coded = name in ("zipcache", "gear", "turboquant")
    assert lost > noise and error < 2 * noise + (0.25 * lost if coded else 0.0)
