"""Ragged storage: heads that keep different numbers of tokens, behind tensors that a cache may work with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torchaccel.kernels import ragged, reference
from torchaccel.kernels.ragged import PAGE
from torchaccel.kernels.spec import AttentionSpec, KVFormat

from torchaccel.errors import EvictedTokensError
from torchaccel.runtime.compiled_graph import writable_pair
from torchaccel.runtime.eviction import HeadWindows, RaggedEviction
from torchaccel.runtime.kv import LogicalKV, kv_bytes, view
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.ragged import RaggedStorage, Segments, places, store_ragged

FORMAT = KVFormat("dense", "float32", 6)
SPEC = AttentionSpec("decode", 6, 2, "float32", FORMAT, FORMAT, 0.7, positions=True, index="blocks", index_block=PAGE)


@dataclass(frozen=True)
class Policy(RaggedEviction):
    windows: HeadWindows | None = None


def layouts(policy=None):
    policy = Policy() if policy is None else policy
    return tuple(Layout(FORMAT, keys, True, policy) for keys in (True, False))


class Cache:
    """A ragged cache, and next to it all tokens ``[B, H, S, D]`` with marks of those that are kept."""

    def __init__(self, kept, policy=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.k, self.v = (torch.randn(*kept.shape, 6, generator=generator) for _ in range(2))
        self.kept, tokens = kept, kept.shape[2]
        stored = store_ragged(layouts(policy), self.k, self.v, kept, tokens, None)
        self.keys, self.values = (view(storage, 0, tokens, tokens) for storage in stored)

    def changed(self, of_cache, of_tensor):
        """Another cache: what an operation makes of this one."""
        other = copy.copy(self)
        other.keys, other.values = of_cache(self.keys), of_cache(self.values)
        other.k, other.v, other.kept = of_tensor(self.k), of_tensor(self.v), of_tensor(self.kept)
        return other

    def attends(self, new=1, seed=1):
        """Append tokens as a compiled step does; checks what is attended to, and returns the longer cache."""
        generator = torch.Generator().manual_seed(seed)
        batch, heads, tokens = self.kept.shape
        q = torch.randn(batch, 2 * heads, new, 6, generator=generator)
        fresh = [torch.randn(batch, heads, new, 6, generator=generator) for _ in range(2)]
        keys, values = writable_pair(self.keys, self.values, new)
        storage = keys.physical
        lens = torch.tensor(storage.lengths(keys.start, keys.end, tokens))
        tables = storage.positions, storage.pages, storage.tails
        run = partial(reference.decode_attention, SPEC)
        got = ragged.attend(run, q, *fresh, storage.buf, values.physical.buf, lens, None, *tables)
        other = copy.copy(self)
        for part in (keys, values):
            part.physical.filled = tokens + new
        other.keys, other.values = (view(part.physical, 0, tokens + new, tokens + new) for part in (keys, values))
        other.k, other.v = torch.cat([self.k, fresh[0]], 2), torch.cat([self.v, fresh[1]], 2)
        other.kept = torch.cat([self.kept, self.kept.new_ones(batch, heads, new)], 2)
        later = torch.arange(tokens + new) > torch.arange(tokens, tokens + new)[:, None]
        scores = 0.7 * q @ other.k.repeat_interleave(2, 1).mT
        hidden = ~other.kept.repeat_interleave(2, 1)[:, :, None] | later
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        torch.testing.assert_close(got, weights @ other.v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
        return other


def random_marks(batch=2, heads=3, tokens=123, seed=0):
    """Some heads keep a tenth, some nearly all."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, heads, 1, generator=generator)
    marks = torch.rand(batch, heads, tokens, generator=generator) < share
    marks[..., -1] = True
    return marks


def test_bytes_are_those_of_the_pages():
    marks = random_marks(tokens=1000)
    cache = Cache(marks)
    counts, token = marks.sum(-1), 2 * 6 * 4 + 4
    least = int(counts.sum()) * token
    # Room for 32 more tokens and a page at most for each head, and the tables.
    most = least + marks[..., 0].numel() * ((int(counts.sum()) // 6 // 16 + PAGE) * token + 4 * 40 + 8)
    assert least < kv_bytes([cache.keys, cache.values]) <= most < marks.numel() * token


def test_operations_of_a_cache():
    cache = Cache(random_marks()).attends(5).attends(1)
    rows = torch.tensor([1, 0, 1])
    for of_cache, of_tensor in (
        (lambda x: x, lambda x: x),
        (lambda x: x[..., :-3, :], lambda x: x[:, :, :-3]),
        (lambda x: x.index_select(0, rows), lambda x: x[rows]),
        (lambda x: x[rows, ...], lambda x: x[rows]),
        (lambda x: x.clone(), lambda x: x),
        (lambda x: x.detach(), lambda x: x),
        (lambda x: x.repeat_interleave(2, dim=0), lambda x: x.repeat_interleave(2, 0)),
        (lambda x: x.to("cpu"), lambda x: x),
        (copy.deepcopy, lambda x: x),
    ):
        other = cache.changed(of_cache, of_tensor)
        assert isinstance(other.keys, LogicalKV) and other.keys.shape == other.k.shape
        other.attends(2, seed=2).attends(1, seed=3)
    cache.attends(1, seed=4)


def test_grows_beyond_its_room():
    cache = Cache(random_marks(tokens=42))
    made = set()
    for step in range(100):
        cache = cache.attends(1, seed=step)
        made.add(id(cache.keys.physical.segments))
    assert 3 <= len(made) <= 5


def test_two_continuations_keep_their_own_tokens():
    root = Cache(random_marks())
    first = root.attends(3, seed=1)
    second = root.attends(4, seed=2)
    assert second.keys.physical is not first.keys.physical
    first.attends(1, seed=3)
    second.attends(1, seed=4)
    rewound = second.changed(lambda x: x[..., :-2, :], lambda x: x[:, :, :-2])
    del second
    rewound.attends(1, seed=5)


def test_what_was_pruned_cannot_be_read_or_cut():
    cache = Cache(random_marks()).attends(4)
    fewest = int(cache.kept.sum(-1).min())
    with pytest.raises(EvictedTokensError, match=rf"all 127 tokens.*keeps {fewest} .*Policy"):
        cache.keys.dense()
    with pytest.raises(EvictedTokensError, match=r"columns 0\.\.122; its first 123 columns.*Policy"):
        cache.keys[..., :122, :]


def test_a_cache_that_lacks_nothing_reads_as_a_tensor():
    cache = Cache(torch.ones(2, 3, 42, dtype=torch.bool)).attends(40)
    assert torch.equal(cache.keys.dense(), cache.k) and torch.equal(cache.values + 0, cache.v)


class TestWindows:
    windows = HeadWindows((True, False, True), sinks=3, recent=10)
    most = 3 + 10 + HeadWindows.REWIND

    def cache(self, tokens=200):
        marks = torch.ones(2, 3, tokens, dtype=torch.bool)
        marks[:, [0, 2], 3 : tokens - 10 - HeadWindows.REWIND] = False
        return Cache(marks, Policy(self.windows))

    def held(self, cache):
        """Columns that each head of row 0 stores."""
        storage = cache.keys.physical
        segments = storage.segments
        counts = segments.counts + cache.keys.end - segments.base
        slots = places(segments.starts, counts)
        return [part.tolist() for part in storage.positions[0, 0, slots].split(counts.flatten().tolist())]

    def test_what_left_the_window_is_dropped_when_storage_is_made_anew(self):
        cache = self.cache()
        for step in range(150):
            keys, values = writable_pair(cache.keys, cache.values, 1)
            for part in (keys, values):
                part.physical.filled = part.end + 1
            cache.keys, cache.values = (view(p.physical, 0, p.end + 1, p.end + 1) for p in (keys, values))
            held = self.held(cache)
            length = 201 + step
            recent = list(range(length - 10, length))
            for head in (0, 2, 3, 5):
                assert held[head][:3] == [0, 1, 2] and held[head][-10:] == recent
                assert len(held[head]) <= self.most + cache.keys.physical.segments.room
            assert held[1] == held[4] == list(range(length))

    def test_a_few_tokens_can_be_taken_back(self):
        cache = self.cache()
        shorter = cache.keys[..., : 200 - HeadWindows.REWIND, :]
        own = writable_pair(shorter, cache.values[..., : 200 - HeadWindows.REWIND, :], 1)[0].clone()
        assert self.held(type("C", (), {"keys": own}))[0] == [0, 1, 2, *range(158, 168)]
        with pytest.raises(EvictedTokensError, match="Policy"):
            cache.keys[..., : 199 - HeadWindows.REWIND, :]

    def test_a_long_turn_is_too_much(self):
        cache = self.cache()
        storage = cache.keys.clone().physical
        assert not storage.oversized(210) and storage.oversized(500)


def test_segments_are_pages_in_a_row():
    segments = Segments(torch.tensor([[5, 40], [0, 32]]), 70, 33)
    assert segments.pages.tolist() == [[2, 3], [2, 3]] and segments.slots == 10 * PAGE
    assert segments.starts.tolist() == [[0, 64], [160, 224]] and segments.tails.tolist() == [[5, 104], [160, 256]]
    assert segments.table().tolist() == [[[0, 1, -1], [2, 3, 4]], [[5, 6, -1], [7, 8, 9]]]
    columns = segments.columns()
    assert [int(columns[slot]) for slot in (5, 6, 63, 104, 160, 256)] == [70, 71, 128, 70, 70, 70]
    skipped = torch.tensor([[1, 0], [0, 30]])
    assert places(segments.starts, torch.tensor([[3, 1], [0, 2]]), 1, skipped).tolist() == [0, 2, 3, 64, 224, 255]
    assert isinstance(Cache(random_marks()).keys.physical, RaggedStorage)
