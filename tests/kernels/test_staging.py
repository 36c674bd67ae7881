"""Caches in another memory: what is gathered and sent over gives what the lists give in place."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchaccel.kernels import reference, staging
from torchaccel.kernels.spec import AttentionSpec, KVFormat

from tests.e2e.generation import compiled, greedy, prompt

FILLED, CAPACITY = 123, 192
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(dtype, unit, pruned, dim=42, start=0):
    name = str(dtype).removeprefix("torch.")
    fmt = KVFormat("dense", name, dim)
    spec = AttentionSpec(
        "decode", dim, 3, name, fmt, fmt, dim**-0.5, mask="bool", positions=pruned, index=unit, index_block=16
    )
    k_buf, v_buf = (torch.full((2, 2, CAPACITY, dim), torch.nan).to(dtype) for _ in range(2))
    for buf in (k_buf, v_buf):
        buf[:, :, :FILLED] = torch.randn(2, 2, FILLED, dim).to(dtype)
    new = [torch.randn(2, 2, 1, dim).to(dtype) for _ in range(2)]
    logical = 400 if pruned else FILLED - start
    positions = None
    if pruned:
        columns = torch.rand(2, 2, logical).argsort(-1)[..., :FILLED].sort(-1).values
        positions = torch.full((2, 2, CAPACITY), -7, dtype=torch.int32)
        positions[..., :FILLED] = columns.int()
    mask = torch.ones(2, 1, 1, logical + 1, dtype=torch.bool)
    mask[1, ..., :11] = False
    entries = FILLED // 16 + 1 if unit == "blocks" else FILLED
    index = torch.rand(2, 2, entries).argsort(-1)[..., : entries // 2].int()
    index[:, 1, -2:] = -1
    lens = torch.tensor([start, FILLED, logical])
    q = torch.randn(2, 6, 1, dim).to(dtype)
    return spec, (q, *new, k_buf, v_buf, lens, mask, positions, index)


def cloned(args):
    return [None if x is None else x.clone() for x in args]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", ["blocks", "tokens"])
@pytest.mark.parametrize(("pruned", "start"), [(False, 0), (False, 5), (True, 0)])
def test_staged_attention_is_that_to_the_lists(dtype, unit, pruned, start):
    spec, args = problem(dtype, unit, pruned, start=start)
    ours, theirs = cloned(args), cloned(args)
    expected = reference.decode_attention(spec, *theirs)
    run = partial(reference.decode_attention, staging.staged_spec(spec))
    got = staging.attend(run, spec, *ours)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    # What is appended lies where it would in place, and nothing else was touched.
    for mine, other in zip(ours[3:8], theirs[3:8], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=0, rtol=0, equal_nan=True)
    missed = reference.decode_attention(spec, *cloned(args)[:-1], torch.full_like(args[-1], -1))
    assert not torch.allclose(missed, expected, atol=0.1)


def test_slots_of_lists():
    spec, _ = problem(torch.float32, "blocks", False)
    index = torch.tensor([[[7, -1, 0]]], dtype=torch.int32)
    slots = staging.listed_slots(spec, index, 3, 123)[0, 0]
    assert slots[:16].tolist() == [*range(112, 123), *[-1] * 5]
    assert slots[16:32].tolist() == [-1] * 16 and slots[32:].tolist() == [-1] * 3 + list(range(3, 16))


def test_whole_buffers_are_sent_and_tokens_come_back():
    spec, (q, k_new, v_new, k_buf, v_buf, lens, mask, *_) = problem(torch.float32, "contiguous", False)
    run = partial(reference.decode_attention, spec)
    expected = run(q, k_new, v_new, *cloned((k_buf, v_buf)), lens, mask, None)
    got = staging.attend_whole(run, q, k_new, v_new, k_buf, v_buf, lens, mask, None)
    assert torch.equal(got, expected)
    assert torch.equal(k_buf[:, :, FILLED], k_new[:, :, 0])


@pytest.mark.parametrize(
    "method",
    [
        {"method": "quest", "tokens": 48, "dense_layers": 0},
        {"method": "sentence_kv", "tokens": 20, "window": 6, "start": 3, "recent": 5, "longest": 9},
    ],
)
def test_generation_is_the_same(method, monkeypatch):
    family = "sparse_attention" if method["method"] == "quest" else "kv_compression"
    inputs = prompt(2, 123, padding=(0, 21))
    _, fast = compiled("llama", options={family: method})
    expected = greedy(fast, inputs, 24)
    calls = []
    attend = staging.attend
    monkeypatch.setattr(staging, "is_away", lambda q, buf: True)
    monkeypatch.setattr(staging, "attend", lambda *args: calls.append(args[1]) or attend(*args))
    _, fast = compiled("llama", options={family: method})
    assert torch.equal(greedy(fast, inputs, 24), expected)
    assert len(calls) == 23 * 3
