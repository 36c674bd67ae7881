"""Logical KV tensors: what a model may do to a cache outside of the compiled graph, and who may overwrite whom."""

import copy
import pickle

import pytest
import torch
from torchaccel.kernels import kv_format
from torchaccel.kernels.spec import KVFormat

import torchaccel
from torchaccel.errors import EvictedTokensError
from torchaccel.runtime.compiled_graph import writable_pair
from torchaccel.runtime.kv import LogicalKV, compress, view, writable
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.storage import grown

DENSE = Layout(KVFormat("dense", "float32", 16))
INT8 = Layout(KVFormat("int8", "float32", 16, "channel"))
GEAR = Layout(KVFormat("int8", "float32", 16, "channel", rank=2, outliers=2))
PRUNED = Layout(KVFormat("dense", "float32", 16), positions=True, pruned=True)
EMPTY = Layout(KVFormat("empty", "float32", 16))
TOLERANCE = {"dense": 0.0, "int8": 0.03}


def tokens(n, batch=2, seed=0):
    return torch.randn(batch, 3, n, 16, generator=torch.Generator().manual_seed(seed))


def close(layout, got, expected):
    torch.testing.assert_close(got, expected, atol=TOLERANCE[layout.format.kind], rtol=0)


def append(kv, new):
    """What a compiled step does: make room, write, and return the longer tensor."""
    own = writable(kv, new.shape[2])
    storage = own.physical
    kv_format.append(storage.layout.format, storage.buf, own.end, new)
    storage.filled = own.end + new.shape[2]
    return view(storage, own.start, storage.filled, own.shape[2] + new.shape[2])


@pytest.mark.parametrize("layout", [DENSE, INT8, GEAR], ids=["dense", "int8", "gear"])
class TestKeepsLayout:
    def test_operations_of_a_cache(self, layout):
        x = tokens(130)
        kv = compress(layout, x)
        rows = torch.tensor([1, 0, 1])
        for got, expected in (
            (kv[..., :-3, :], x[..., :-3, :]),
            (kv[:, :, 5:], x[:, :, 5:]),
            (kv[:, :, 7:-9, :], x[:, :, 7:-9, :]),
            (kv.index_select(0, rows), x[rows]),
            (kv[rows, ...], x[rows]),
            (kv[torch.tensor([True, False]), ...], x[:1]),
            (kv.clone(), x),
            (kv.detach(), x),
            (kv.repeat_interleave(2, dim=0), x.repeat_interleave(2, 0)),
            (kv[rows[1:2], ...].repeat(3, 1, 1, 1), x[:1].repeat(3, 1, 1, 1)),
            (kv.to("cpu"), x),
            (copy.deepcopy(kv), x),
        ):
            assert isinstance(got, LogicalKV) and got.shape == expected.shape and got.dtype == x.dtype
            close(layout, got.dense(), expected)

    def test_anything_else_reads_the_tokens(self, layout):
        x = tokens(70)
        kv = compress(layout, x)
        for got, expected in ((kv + 0, x), (kv.repeat_interleave(2, dim=1), x.repeat_interleave(2, 1)), (kv[0], x[0])):
            assert not isinstance(got, LogicalKV)
            close(layout, got, expected)
        assert kv.to(torch.bfloat16).dtype == torch.bfloat16 and kv.numel() == x.numel()
        close(layout, pickle.loads(pickle.dumps(kv)), x)

    def test_appending_token_by_token_is_appending_at_once(self, layout):
        x = tokens(200)
        kv = compress(layout, x[:, :, :50])
        for index in range(50, 200):
            kv = append(kv, x[:, :, index : index + 1])
        assert torch.equal(kv.dense(), compress(layout, x).dense())

    def test_rewind_and_continue(self, layout):
        x, other = tokens(130), tokens(40, seed=1)
        kv = compress(layout, x)[..., :-10, :]
        kv = append(kv, other)
        close(layout, kv.dense(), torch.cat([x[:, :, :120], other], 2))

    def test_two_continuations_keep_their_own_tokens(self, layout):
        x, first, second = tokens(130), tokens(5, seed=1), tokens(7, seed=2)
        root = compress(layout, x)
        a, b = append(root, first), append(root, second)
        assert a.physical is b.physical is root.physical
        c = append(a, second)
        assert c.physical is not a.physical
        for kv, expected in ((root, [x]), (a, [x, first]), (b, [x, second]), (c, [x, first, second])):
            close(layout, kv.dense(), torch.cat(expected, 2))
        shorter = append(b[..., :-10, :], first)
        close(layout, shorter.dense(), torch.cat([x[:, :, :127], first], 2))
        close(layout, b.index_select(0, torch.tensor([1, 1])).dense(), torch.cat([x, second], 2)[[1, 1]])

    def test_tokens_nobody_reads_any_more_are_not_kept(self, layout):
        kv = append(compress(layout, tokens(130)), tokens(3, seed=1))
        storage = kv.physical
        kv = kv[..., :-3, :]
        assert writable(kv, 1).physical is storage and not storage.cuts

    def test_made_under_inference_mode_used_outside(self, layout):
        x = tokens(70)
        with torch.inference_mode():
            kv = compress(layout, x)
            kv = append(kv[..., :-1, :], x[:, :, :4])
        kv = append(kv, x[:, :, :4])
        close(layout, kv.dense(), torch.cat([x[:, :, :-1], x[:, :, :4], x[:, :, :4]], 2))

    def test_writing_into_it_is_an_error(self, layout):
        kv = compress(layout, tokens(9))
        with pytest.raises(EvictedTokensError, match=r"in place.*to_dense"):
            kv.zero_()


def test_sliding_start_moves_whole_blocks():
    x = tokens(300)
    kv = compress(INT8, x)[:, :, 100:]
    exact = kv.dense()
    keys, values = writable_pair(kv, compress(INT8, x)[:, :, 100:], 1000)
    assert keys.physical is not kv.physical and keys.start == values.start == 100 % 64
    assert torch.equal(keys.dense(), exact)


def test_capacity_is_always_above_the_length():
    for length in (0, 1, 63, 64, 65, 1000, 32768):
        assert length < grown(length) <= length + max(128, length // 16 + 64) and grown(length) % 64 == 0


def test_growth_copies_each_token_a_few_times():
    kv, copied = compress(DENSE, tokens(64)), 0
    for _ in range(4000):
        before = kv.physical
        kv = append(kv, tokens(1))
        copied += kv.shape[2] if kv.physical is not before else 0
    assert copied < 17 * kv.shape[2]


def test_pruned_tokens_cannot_be_read_back():
    x = tokens(10)
    kept = torch.tensor([[[0, 3, 9]], [[0, 4, 9]]])
    kv = compress(PRUNED, x.gather(2, kept[..., None].expand(2, 3, 3, 16)), 10, kept)
    assert kv.shape[2] == 10 and kv.end - kv.start == 3
    with pytest.raises(EvictedTokensError, match=r"all 10 tokens.*keeps 3"):
        kv + 0
    longer = append(kv, tokens(2))
    assert longer.shape[2] == 12 and longer[..., :-2, :].end == 3
    with pytest.raises(EvictedTokensError, match="cannot be cut apart"):
        longer[..., :5, :]


def test_an_empty_layout_costs_nothing_and_holds_nothing():
    kv = compress(EMPTY, tokens(10))
    assert torchaccel.kv_bytes([kv]) == 0 and kv.shape == (2, 3, 10, 16)
    assert kv[..., :-4, :].shape[2] == 6 and kv.index_select(0, torch.tensor([0])).shape[0] == 1
    with pytest.raises(EvictedTokensError):
        kv.sum()


def test_bytes_are_what_is_allocated_and_shared_storage_counts_once():
    kv = compress(DENSE, tokens(100))
    assert torchaccel.kv_bytes([kv, kv[..., :-1, :]]) == 2 * 3 * grown(100) * 16 * 4
    x = tokens(100)
    assert torchaccel.kv_bytes([x, x[:, :, :50]]) == x.nbytes
