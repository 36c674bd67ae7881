"""What is taken for granted about the device at hand while nothing was measured: compiling must not wait for that."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import probe
from .devices import device_facts
from .facts import DeviceFacts


def assumed_facts(device: torch.device) -> DeviceFacts | None:
    """The table's facts for ``device``: of its instruction set for a CPU, of its name for a GPU; None if not there."""
    if device.type == "cpu":
        facts = device_facts(_instruction_set())
        threads = torch.get_num_threads()
        share = threads / facts.processors
        rates = tuple((name, rate * share) for name, rate in facts.gflops)
        return replace(
            facts,
            processors=threads,
            dram_gbs=min(facts.dram_gbs, threads * facts.processor_gbs),
            cache_gbs=facts.cache_gbs * share,
            gflops=rates,
        )
    try:
        return device_facts(probe.device_name(device))
    except ValueError:
        return None


def _instruction_set() -> str:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    for name, needed in (("amx", "amx_bf16"), ("avx512_bf16", "avx512_bf16"), ("avx512", "avx512_f"), ("neon", "neon")):
        if capabilities.get(needed):
            return name
    return "avx2"
