"""Attention that chooses for other layers: what it returns is attention to everything, and the list is by its mass."""

from dataclasses import replace

import pytest
import torch
from torchaccel.kernels import ops
from torchaccel.kernels.candidates import candidates
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat


def plan(spec):
    return Plan(spec, ((None, candidates(spec, "cpu")[0]),)).key()


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 42), ("bfloat16", 16)])
def test_the_output_is_dense_and_the_list_by_mass(dtype, head_dim):
    ops.library()
    fmt = KVFormat("dense", dtype, head_dim)
    spec = AttentionSpec("decode", head_dim, 3, dtype, fmt, fmt, scale=0.3, mask="bool")
    whole, told = plan(spec), plan(replace(spec, mass=True))
    stored, capacity = 123, 192
    q, k_new, v_new = (torch.randn(2, h, 1, head_dim).to(DTYPES[dtype]) for h in (6, 2, 2))
    buffers = [torch.randn(2, 2, capacity, head_dim).to(DTYPES[dtype]) for _ in range(2)]
    for buf in buffers:
        buf[:, :, stored:] = torch.nan
    mask = torch.ones(2, 1, 1, stored + 1, dtype=torch.bool)
    mask[1, ..., :42] = False
    args = (q, k_new, v_new, *buffers, torch.tensor([0, stored, stored]), mask, None)
    dense = torch.ops.torchaccel.attend(*args, whole)
    out, listed = torch.ops.torchaccel.attend_choosing(*args, 6, stored, told, whole)
    assert torch.equal(out, dense)
    keys = torch.cat([buffers[0][:, :, :stored], k_new], 2).float().repeat_interleave(3, 1)
    weights = torch.softmax((q.float() @ keys.mT * 0.3).masked_fill(~mask, -torch.inf), -1)
    mass = weights.unflatten(1, (2, 3)).sum(2)[:, :, 0, :stored]
    assert torch.equal(listed, mass.topk(6).indices.sort(-1).values.int())
    # As many tokens as it takes, the new one included: nothing is told.
    out, listed = torch.ops.torchaccel.attend_choosing(*args, 6, stored + 1, told, whole)
    assert torch.equal(out, dense) and listed.shape == (2, 2, 6)
