"""Tokens of several classes, each in a format of its own, are attended under one softmax."""

from dataclasses import replace

import pytest
import torch
from torchaccel.kernels import kv_format, mixed_precision, reference
from torchaccel.kernels.candidates import build, candidates
from torchaccel.kernels.mixed_precision import TokenClass
from torchaccel.kernels.spec import DTYPES, KVFormat

from tests.kernels.cpp_support import cases
from tests.kernels.cpp_support.cases import TOLERANCE, poisoned

BATCH, HEADS, GROUP, DIM, LENGTH = 2, 2, 3, 64, 300


def formats(kind, dtype):
    return KVFormat(kind, dtype, DIM, "channel"), KVFormat(kind, dtype, DIM, "token", packing="token")


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("bfloat16", 90)])
def test_classes_attend_as_one_cache(dtype, window):
    torch.manual_seed(0)
    base = cases.spec(dtype, DIM, GROUP, mask="bool", window=window, sinks=3 if window else 0)
    torch_dtype = DTYPES[dtype]
    keys, values = (torch.randn(BATCH, HEADS, LENGTH + 1, DIM).to(torch_dtype) for _ in range(2))
    q = torch.randn(BATCH, HEADS * GROUP, 1, DIM).to(torch_dtype)
    # Every head has classes of its own: 100 tokens that matter, 180 that do not, the newest 20 as they are.
    order = torch.stack([torch.randperm(280) for _ in range(BATCH * HEADS)]).view(BATCH, HEADS, 280)
    members = order[..., :100].sort(-1).values, order[..., 100:].sort(-1).values
    classes, read_keys, read_values, columns = [], [], [], []
    for kind, column in zip(("int4", "int2"), members, strict=True):
        where = column[..., None].expand(-1, -1, -1, DIM)
        fmts = formats(kind, dtype)
        buffers = []
        for fmt, x in zip(fmts, (keys, values), strict=True):
            buf = poisoned(fmt, BATCH, HEADS, column.shape[2] + 64)
            kv_format.append(fmt, buf, 0, x.gather(2, where))
            buffers.append(buf)
        positions = torch.full((BATCH, HEADS, 256), -7, dtype=torch.int32)
        positions[..., : column.shape[2]] = column.int()
        classes.append(TokenClass(*buffers, column.shape[2], positions))
        n = column.shape[2]
        read_keys.append(kv_format.read(fmts[0], buffers[0], 0, n, n))
        read_values.append(kv_format.read(fmts[1], buffers[1], 0, n, n))
        columns.append(column)
    recent = [poisoned(fmt, BATCH, HEADS, 40) for fmt in (base.key_format, base.value_format)]
    for buf, x in zip(recent, (keys, values), strict=True):
        buf[:, :, :20] = x[:, :, 280:LENGTH]
    own = torch.full((BATCH, 1, 40), -7, dtype=torch.int32)
    own[..., :20] = torch.arange(280, LENGTH)
    mask = torch.rand(BATCH, 1, 1, LENGTH + 1) > 0.2
    mask[1, ..., :9] = False
    mask[..., -1] = True
    specs = [
        *(mixed_precision.spec_of(base, formats(kind, dtype)) for kind in ("int4", "int2")),
        mixed_precision.spec_of(base),
    ]
    new = keys[:, :, LENGTH:], values[:, :, LENGTH:]
    lens = torch.tensor([0, 20, LENGTH])
    # The truth: all tokens as they are read, in a single dense cache.
    whole = replace(base, positions=True)
    tail = torch.arange(280, LENGTH).expand(BATCH, HEADS, -1)
    k, v = torch.cat([*read_keys, keys[:, :, 280:LENGTH]], 2), torch.cat([*read_values, values[:, :, 280:LENGTH]], 2)
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, 5)).contiguous()  # noqa: E731
    at = torch.nn.functional.pad(torch.cat([*columns, tail], 2), (0, 5)).int()
    want = reference.decode_attention(whole, q, *new, pad(k), pad(v), torch.tensor([0, LENGTH, LENGTH]), mask, at)
    for implementation in ("seed", "reference"):
        picks = [candidates(spec, "cpu")[0 if implementation == "seed" else -1] for spec in specs]
        kernels = [build(spec, pick) for spec, pick in zip(specs, picks, strict=True)]
        buffers = [buf.clone() for buf in recent]
        got = mixed_precision.attend(kernels, classes, q, *new, *buffers, lens, mask, own.clone())
        torch.testing.assert_close(got.float(), want.float(), atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
        assert torch.equal(buffers[0][:, :, 20], keys[:, :, LENGTH])


def test_lists_and_mass_are_refused():
    base = cases.spec("float32", DIM, GROUP)
    with pytest.raises(ValueError, match="without lists or mass"):
        mixed_precision.spec_of(replace(base, mass=True))
