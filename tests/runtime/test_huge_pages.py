"""Large buffers of caches ask for huge pages; small ones do not."""

from pathlib import Path

import pytest
import torch
from torchaccel.kernels.spec import KVFormat

from torchaccel.runtime.layout import Layout
from torchaccel.runtime.storage import store


def asked_for(address: int) -> bool:
    """Whether huge pages were asked for where ``address`` lies."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = line.split()[0].split("-")
        if len(span) == 2:
            within = int(span[0], 16) <= address < int(span[1], 16)
        elif within and line.startswith("VmFlags"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="this system has no huge pages",
)
def test_large_buffers_ask_for_huge_pages():
    layout = Layout(KVFormat("dense", "float32", 64))
    small, large = (store(layout, torch.randn(1, 1, n, 64), n) for n in (6, 65536))
    assert asked_for(large.buf.data_ptr() + large.buf.nbytes // 2)
    assert not asked_for(small.buf.data_ptr())
    copy, _ = large.copy(0, 65536, 42)
    assert asked_for(copy.buf.data_ptr() + copy.buf.nbytes // 2)
    assert torch.equal(copy.read(0, 65536), large.read(0, 65536))
