"""Rows that begin alike store their tokens once: what keeps that so, and what falls back to copies, exactly."""

import copy
import gc
import random

import pytest
import torch
from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat

import torchaccel
from torchaccel.errors import SharedPrefixError
from torchaccel.runtime.compiled_graph import prefixes
from torchaccel.runtime.kv import LogicalKV, compress, unshared, view, writable
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.prefix import MIN_TOKENS
from torchaccel.runtime.storage import grown

DENSE = Layout(KVFormat("dense", "float32", 16))
HALF = Layout(KVFormat("dense", "bfloat16", 16))
INT8 = Layout(KVFormat("int8", "float32", 16, "channel"))
PRUNED = Layout(KVFormat("dense", "float32", 16), positions=True, pruned=True)
# int8 tokens behind the prefix are quantised in other blocks after a copy than before: twice the error of one rounding.
TOLERANCE = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.06}
LAYOUTS = pytest.mark.parametrize("layout", [DENSE, HALF, INT8], ids=["float32", "bfloat16", "int8"])


def tokens(n, batch=1, seed=0, layout=DENSE):
    x = torch.randn(batch, 3, n, 16, generator=torch.Generator().manual_seed(seed))
    return x.to(getattr(torch, layout.format.dtype))


def close(layout, got, expected):
    tolerance = TOLERANCE["int8" if layout.format.is_quantised else layout.format.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def append(kv, new):
    """What a compiled step does: make room, write, and return the longer tensor."""
    own = writable(kv, new.shape[2])
    storage = own.physical
    kv_format.append(storage.layout.format, storage.buf, own.end, new)
    storage.filled = own.end + new.shape[2]
    return view(storage, own.start, storage.filled, own.shape[2] + new.shape[2])


def is_shared(kv, levels=1):
    return kv.kv_layout.prefixes == levels and len(kv.physical.prefixes) == levels


@LAYOUTS
@pytest.mark.parametrize("length", [MIN_TOKENS, 203])
def test_repeated_rows_share_their_tokens_and_copy_nothing(layout, length):
    x = tokens(length, layout=layout)
    kv = compress(layout, x)
    stored = kv.dense()
    rows = torch.zeros(6, dtype=torch.int64)
    for repeated in (
        kv.repeat_interleave(6, dim=0),
        kv.repeat_interleave(6, 0),
        kv.index_select(0, rows),
        kv[rows, ...],
        kv.expand(6, -1, -1, -1),
        kv.expand((6, 3, length, 16)),
        kv.repeat(6, 1, 1, 1),
    ):
        assert isinstance(repeated, LogicalKV) and is_shared(repeated) and repeated.shape == (6, 3, length, 16)
        assert repeated.prefix0 is kv.buf and repeated.physical.unshared is None
        assert torch.equal(repeated.dense(), stored.expand(6, -1, -1, -1))
        names, kept = repeated.__tensor_flatten__()
        assert names == ["buf", "prefix0"] and kept.prefixes == 1 and hash(kept) != hash(layout)


@LAYOUTS
def test_every_row_continues_on_its_own(layout):
    x, new = tokens(203, 2, layout=layout), tokens(70, 6, 1, layout)
    kv = compress(layout, x).repeat_interleave(3, dim=0)
    for index in range(70):
        kv = append(kv, new[:, :, index : index + 1])
    assert is_shared(kv)
    close(layout, kv.dense(), torch.cat([x.repeat_interleave(3, 0), new], 2))


@LAYOUTS
def test_operations_of_a_cache_keep_the_prefix(layout):
    x, new = tokens(203, layout=layout), tokens(9, 4, 1, layout)
    kv = append(compress(layout, x).repeat_interleave(4, dim=0), new)
    whole = torch.cat([x.expand(4, -1, -1, -1), new], 2)
    rows = torch.tensor([3, 3, 0, 1, 1])
    for got, expected in (
        (kv[..., :-3, :], whole[..., :-3, :]),
        (kv[:, :, :203], whole[:, :, :203]),
        (kv.index_select(0, rows), whole[rows]),
        (kv[torch.tensor([False, True, True, False]), ...], whole[1:3]),
        (kv.repeat_interleave(2, dim=0), whole.repeat_interleave(2, 0)),
        (kv.clone(), whole),
        (kv.detach(), whole),
        (copy.deepcopy(kv), whole),
        (kv.to("cpu"), whole),
    ):
        assert is_shared(got) and got.shape == expected.shape
        assert got.prefix0 is kv.prefix0
        close(layout, got.dense(), expected)
    close(layout, kv + 0, whole)
    moved = kv.to("meta")
    assert is_shared(moved) and moved.device.type == moved.prefix0.device.type == "meta"


@LAYOUTS
def test_what_cannot_be_kept_is_copied(layout):
    """A cut into the prefix from either side, rows of several prefixes mixed, and a request for plain storage."""
    x, new = tokens(203, 2, layout=layout), tokens(9, 6, 1, layout)
    kv = append(compress(layout, x).repeat_interleave(3, dim=0), new)
    whole = torch.cat([x.repeat_interleave(3, 0), new], 2)
    mixed = torch.tensor([0, 3, 1, 4, 2, 5])
    for got, expected, reason in (
        (kv[:, :, :150], whole[:, :, :150], "cropped"),
        (kv[:, :, 5:], whole[:, :, 5:], "cropped"),
        (kv[:, :, 205:], whole[:, :, 205:], "cropped"),
        (kv.index_select(0, mixed), whole[mixed], "mixed"),
        (kv[torch.tensor([0, 1, 2, 3]), ...], whole[:4], "mixed"),
        (unshared(kv), whole, None),
    ):
        assert is_shared(got, 0) and got.shape == expected.shape
        assert reason is None or reason in got.physical.unshared
        close(layout, got.dense(), expected)
        longer = append(got, new[: got.shape[0]])
        close(layout, longer.dense(), torch.cat([expected, new[: got.shape[0]]], 2))
    within = torch.tensor([1, 0, 2, 5, 5, 3])
    assert is_shared(kv.index_select(0, within))
    close(layout, kv.index_select(0, within).dense(), whole[within])
    close(layout, kv.dense(), whole)


def test_what_is_not_shared_in_the_first_place():
    x = tokens(MIN_TOKENS, 2)
    short = compress(DENSE, x[:, :, 1:]).repeat_interleave(2, dim=0)
    assert is_shared(short, 0) and short.physical.unshared is None
    for rows in ([0, 1, 0, 1], [0, 0, 1], [1, 1, 0, 0], [1, 0]):
        taken = compress(DENSE, x).index_select(0, torch.tensor(rows))
        assert is_shared(taken, 0) and torch.equal(taken.dense(), x[rows])
    pruned = compress(PRUNED, x, 500, torch.arange(MIN_TOKENS).expand(2, 1, -1)).repeat_interleave(2, dim=0)
    assert is_shared(pruned, 0) and "pruned" in pruned.physical.unshared and pruned.physical.positions.shape[0] == 4
    late = compress(DENSE, tokens(200))[:, :, 3:].repeat_interleave(2, dim=0)
    assert is_shared(late, 0) and "sliding" in late.physical.unshared
    assert torch.equal(late.dense(), tokens(200)[:, :, 3:].expand(2, -1, -1, -1))


@LAYOUTS
def test_two_levels(layout):
    """A prompt for all rows, 130 tokens for each of two groups, then every row its own; a third level is copied."""
    x, middle, new = tokens(203, layout=layout), tokens(130, 2, 1, layout), tokens(5, 6, 2, layout)
    outer = append(compress(layout, x).repeat_interleave(2, dim=0), middle)
    kv = append(outer.repeat_interleave(3, dim=0), new)
    assert is_shared(kv, 2) and kv.prefix0 is outer.prefix0 and kv.prefix1 is outer.buf
    whole = torch.cat([x.expand(6, -1, -1, -1), middle.repeat_interleave(3, 0), new], 2)
    close(layout, kv.dense(), whole)
    rows = torch.tensor([2, 2, 0, 5, 4, 5])
    assert is_shared(kv.index_select(0, rows), 2)
    close(layout, kv.index_select(0, rows).dense(), whole[rows])
    for cut in (338 - 5, 300, 203, 100):
        cropped = kv[:, :, :cut]
        assert is_shared(cropped, 2 if cut == 333 else 0)
        close(layout, cropped.dense(), whole[:, :, :cut])
    mixed = torch.tensor([3, 0])
    close(layout, kv.index_select(0, mixed).dense(), whole[mixed])
    deep = append(kv, tokens(130, 6, 3, layout)).repeat_interleave(2, dim=0)
    assert is_shared(deep, 2) and "already" in deep.physical.unshared and deep.shape[0] == 12
    close(layout, deep.dense(), torch.cat([whole, tokens(130, 6, 3, layout)], 2).repeat_interleave(2, 0))


@LAYOUTS
def test_a_prefix_is_read_only_while_it_is_shared(layout):
    x, new = tokens(203, layout=layout), tokens(70, seed=1, layout=layout)
    kv = compress(layout, x)
    repeated = kv.repeat_interleave(2, dim=0)
    before = repeated.dense()
    continued = append(kv, new)
    assert continued.physical is not kv.physical
    rewound = append(continued[:, :, :100], new)
    other = append(kv[:, :, :100], new)
    assert torch.equal(repeated.dense(), before)
    close(layout, continued.dense(), torch.cat([x, new], 2))
    for shorter in (rewound, other):
        close(layout, shorter.dense(), torch.cat([x[:, :, :100], new], 2))
    del repeated
    gc.collect()
    assert append(kv, new[:, :, :1]).physical is kv.physical


@LAYOUTS
def test_an_older_view_is_shared_as_it_was(layout):
    """Repeating a view whose tokens somebody else has overwritten since, or appended to."""
    x, new = tokens(203, layout=layout), tokens(40, seed=1, layout=layout)
    old = compress(layout, x)
    append(old[:, :, :180], new)
    extended = compress(layout, x)
    append(extended, new)
    for kv in (old, extended):
        repeated = kv.repeat_interleave(2, dim=0)
        assert is_shared(repeated)
        close(layout, repeated.dense(), x.expand(2, -1, -1, -1))
        close(layout, append(repeated, new.expand(2, -1, -1, -1)).dense(), torch.cat([x, new], 2).expand(2, -1, -1, -1))


@LAYOUTS
def test_two_continuations_of_shared_rows(layout):
    x, first, second = tokens(203, layout=layout), tokens(5, 3, 1, layout), tokens(7, 3, 2, layout)
    root = compress(layout, x).repeat_interleave(3, dim=0)
    a = append(root, first)
    b = append(root, second)
    c = append(a, second)
    for kv, parts in ((root, []), (a, [first]), (b, [second]), (c, [first, second])):
        assert is_shared(kv)
        close(layout, kv.dense(), torch.cat([x.expand(3, -1, -1, -1), *parts], 2))


def test_a_prefix_is_counted_once():
    kv = compress(DENSE, tokens(200))
    prefix, own = 3 * grown(200) * 64, 3 * 64 * 64
    repeated = [kv.repeat_interleave(n, dim=0) for n in (6, 4)]
    assert torchaccel.kv_bytes(repeated) == prefix + 10 * own
    assert torchaccel.kv_bytes([kv, *repeated]) == prefix + 10 * own
    nested = append(repeated[0], tokens(150, 6)).repeat_interleave(2, dim=0)
    assert torchaccel.kv_bytes([nested]) == prefix + 6 * 3 * grown(150) * 64 + 12 * own


def test_keys_and_values_must_share_alike():
    keys = compress(DENSE, tokens(200)).repeat_interleave(2, dim=0)
    values = compress(DENSE, tokens(190)).repeat_interleave(2, dim=0)
    with pytest.raises(SharedPrefixError, match=r"prefixes of 200 tokens.*190.*to_dense"):
        prefixes(keys.physical, values.physical, [])


@pytest.mark.parametrize("layout", [DENSE, INT8], ids=["dense", "int8"])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_to_a_cache_it_reads_like_a_tensor(layout, seed):
    """Random operations on a family of caches that share storage, each next to a plain tensor."""
    chance = random.Random(seed)
    x = tokens(200, 2, seed)
    kv = compress(layout, x)
    caches = [(kv, x), (kv.repeat_interleave(2, dim=0), x.repeat_interleave(2, 0))]
    for step in range(40):
        kv, plain = chance.choice(caches[-6:])
        batch, length = plain.shape[0], plain.shape[2]
        kind = chance.choice(["append", "append", "repeat", "select", "crop", "clone", "first"])
        if kind == "repeat" and batch <= 8:
            n = chance.choice([2, 3])
            caches.append((kv.repeat_interleave(n, dim=0), plain.repeat_interleave(n, 0)))
        elif kind == "select":
            rows = torch.tensor([chance.randrange(batch) for _ in range(chance.choice([batch, 1, 4]))])
            caches.append((kv.index_select(0, rows), plain[rows]))
        elif kind == "crop" and length > 20:
            cut = chance.choice([length - 1, length - 7, max(1, length - 150)])
            caches.append((kv[:, :, :cut], plain[:, :, :cut]))
        elif kind == "append":
            new = tokens(chance.choice([1, 3, 140]), batch, step)
            caches.append((append(kv, new), torch.cat([plain, new], 2)))
        elif kind == "clone":
            caches.append((kv.clone(), plain))
        elif kind == "first":
            caches.append((kv[:, :, 2:], plain[:, :, 2:]))
        for kv, plain in caches:
            # Codes may be made anew several times along the way.
            torch.testing.assert_close(kv.dense(), plain, atol=0.25 if layout is INT8 else 0.0, rtol=0)
    assert any(kv.kv_layout.prefixes for kv, _ in caches[2:]) and any(not kv.kv_layout.prefixes for kv, _ in caches[2:])
