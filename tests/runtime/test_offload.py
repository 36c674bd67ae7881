"""Caches in files: the same tokens, less memory, and clear errors."""

import pytest
import torch
from torchaccel.kernels.spec import KVFormat
from torchaccel.passes.base import Reason

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt
from torchaccel.errors import OffloadError, OptionsError
from torchaccel.runtime.kv import LogicalKV
from torchaccel.runtime.layout import Layout
from torchaccel.runtime.storage import store

QUEST = {"method": "quest", "tokens": 48, "dense_layers": 0}


def resident() -> int:
    """Bytes of this process's mapped files that are in memory."""
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith(("RssFile", "RssShmem"))]
    return 1024 * sum(int(size) for _, size, _ in lines)


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_memory_of_what_is_not_read_is_given_back(kind, tmp_path):
    tokens = torch.randn(1, 4, 65536, 64)
    fmt = KVFormat(kind, "float32", 64)
    memory = store(Layout(fmt), tokens, 65536)
    before = resident()
    filed = store(Layout(fmt, offload=str(tmp_path)), tokens, 65536)
    assert resident() - before < 0.25 * filed.file_bytes and filed.file_bytes > 16e6
    assert filed.nbytes == 0 and filed.file_bytes == memory.nbytes and not list(tmp_path.iterdir())
    assert torch.equal(filed.read(1000, 1100), memory.read(1000, 1100))
    # The system maps more than was read, up to a megabyte or two for each head.
    assert resident() - before < 0.5 * filed.file_bytes
    assert torch.equal(filed.read(0, 65536), memory.read(0, 65536))
    assert resident() - before > 0.75 * filed.file_bytes
    copy, _ = filed.copy(0, 65536, 100)
    assert copy.mapping is not None and torch.equal(copy.read(65000, 65536), memory.read(65000, 65536))


def test_generation_is_the_same(tmp_path):
    _, memory = compiled("llama", options={"sparse_attention": QUEST})
    inputs = prompt(2, 123, padding=(0, 21))
    expected = greedy(memory, inputs, 40)
    _, files = compiled("llama", options={"sparse_attention": QUEST | {"offload": str(tmp_path)}})
    assert torch.equal(greedy(files, inputs, 40), expected)
    counters = [torchaccel.report(model).records[-1].counter for model in (memory, files)]
    assert counters[0].file_bytes == 0
    assert counters[1].file_bytes > counters[1].kv_bytes
    assert counters[1].file_bytes + counters[1].kv_bytes == counters[0].kv_bytes


@pytest.mark.parametrize(
    "further", [{"method": "tova", "tokens": 32}, {"method": "adakv", "tokens": 32}, {"method": "zipcache"}]
)
def test_tokens_that_are_all_read_stay_in_memory(further, tmp_path):
    asked = {"kv_compression": further, "sparse_attention": QUEST | {"offload": str(tmp_path)}}
    _, model = compiled("llama", options=asked)
    greedy(model, prompt(2, 123, padding=(0, 21)), 20)
    report = torchaccel.report(model)
    reasons = Reason.EVICTING_STEPS, Reason.NEEDS_PLAIN_TOKENS
    assert any(reason.value in line for line in report.declines for reason in reasons), report.declines
    assert report.records[-1].counter.file_bytes == 0 and report.records[-1].counter.kv_bytes > 0


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(OptionsError, match="names a folder"):
        torchaccel.options.resolve({"sparse_attention": QUEST | {"offload": "nowhere"}})
    fmt = KVFormat("dense", "float32", 8)
    with pytest.raises(OffloadError, match="with room"):
        store(Layout(fmt, offload=str(tmp_path / "gone")), torch.zeros(1, 1, 9, 8), 9)
    with pytest.raises(OffloadError, match="device meta"):
        store(Layout(fmt, offload=str(tmp_path)), torch.zeros(1, 1, 9, 8, device="meta"), 9)


def test_on_the_cpu_host_memory_is_where_it_is():
    _, fast = compiled("llama", layers=1, options={"sparse_attention": QUEST | {"offload": "host"}})
    greedy(fast, prompt(1, 60), 2)
    assert torchaccel.report(fast).declines
    assert all(Reason.HOST_ALREADY.value in decline for decline in torchaccel.report(fast).declines)
    counter = torchaccel.report(fast).records[-1].counter
    assert counter.host_bytes == counter.file_bytes == 0 and counter.kv_bytes > 0


def test_tokens_away_from_home():
    """What a GPU's cache in host memory is, with the CPU for its device: counted apart, read and copied as any."""
    tokens = torch.randn(2, 2, 123, 6)
    layout = Layout(KVFormat("dense", "float32", 6), home="cpu")
    storage = store(layout, tokens, 123)
    assert (storage.nbytes, storage.host_bytes) == (0, storage.buf.nbytes) and storage.file_bytes == 0
    assert torch.equal(storage.read(5, 123), tokens[:, :, 5:])
    copy, start = storage.copy(0, 123, 100, batch=torch.tensor([1, 1]))
    assert copy.host_bytes == copy.buf.nbytes and torch.equal(copy.read(start, start + 123), tokens[[1, 1]])
    moved = storage.moved(torch.device("cpu"))
    assert moved.layout.home is None and moved.nbytes == moved.buf.nbytes and moved.host_bytes == 0


def test_a_cache_says_where_it_is_attended_to():
    layout = Layout(KVFormat("dense", "float32", 6), home="meta")
    inner = {"buf": torch.zeros(2, 2, 64, 6)}
    kv = LogicalKV(layout, inner, (2, 2, 9, 6))
    assert kv.device.type == "meta" and kv.buf.device.type == "cpu" and kv.dense().device.type == "meta"
