"""Many new tokens at once: the composition of stock operators equals the reference."""

import pytest
import torch
from torchaccel.kernels import composed, kv_format, reference
from torchaccel.kernels.spec import AttentionSpec, KVFormat

BATCH, HEADS, GROUP, DIM, NEW = 2, 2, 3, 16, 12


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["dense", "int8"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("pruned", [False, True])
def test_equals_the_reference(kind, window, mask_kind, pruned):
    key = KVFormat(kind, "float32", DIM, "channel" if kind == "int8" else "token")
    value = KVFormat(kind, "float32", DIM, "token", packing="token")
    stored, logical = 70, 100 if pruned else 70
    spec = AttentionSpec(
        "decode", DIM, GROUP, "float32", key, value, 0.25, mask=mask_kind, window=window, sinks=2, positions=pruned
    )
    columns = logical + NEW
    mask = torch.ones(BATCH, 1, NEW, columns, dtype=torch.bool).tril(logical)
    mask[1, :, :, :33] = False
    if mask_kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    arguments = []
    for _ in range(2):
        k, v = (kv_format.allocate(f, BATCH, HEADS, 128, torch.device("cpu")) for f in (key, value))
        kv_format.append(key, k, 0, random(BATCH, HEADS, stored, DIM, seed=1))
        kv_format.append(value, v, 0, random(BATCH, HEADS, stored, DIM, seed=2))
        positions = torch.zeros(BATCH, 1, 128, dtype=torch.int32) if pruned else None
        if positions is not None:
            positions[..., :stored] = torch.arange(logical - stored, logical, dtype=torch.int32)
        arguments.append((k, v, torch.tensor([0, stored, logical]), None if mask_kind == "none" else mask, positions))
    q = random(BATCH, HEADS * GROUP, NEW, DIM, seed=3)
    new = random(BATCH, HEADS, NEW, DIM, seed=4), random(BATCH, HEADS, NEW, DIM, seed=5)
    ours = composed.decode_attention(spec, q, *new, *arguments[0])
    theirs = reference.decode_attention(spec, q, *new, *arguments[1])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    if pruned:
        assert torch.equal(arguments[0][4], arguments[1][4])


@pytest.mark.parametrize("window", [None, 5])
def test_prompts_equal_the_reference(window):
    dense = KVFormat("dense", "float32", DIM)
    spec = AttentionSpec("prefill", DIM, GROUP, "float32", dense, dense, 0.25, mask="bool", window=window, sinks=2)
    q = random(BATCH, HEADS * GROUP, 21, DIM, seed=1)
    k, v = random(BATCH, HEADS, 21, DIM, seed=2), random(BATCH, HEADS, 21, DIM, seed=3)
    mask = torch.ones(BATCH, 1, 21, 21, dtype=torch.bool).tril()
    mask[1, :, :, :6] = False
    ours, theirs = (m.prefill_attention(spec, q, k, v, mask) for m in (composed, reference))
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours[1, :, 6:], theirs[1, :, 6:], atol=2e-5, rtol=2e-5)
