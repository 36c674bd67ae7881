"""The table of devices, row by row, and the round trip of facts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from torchaccel.cost.devices import device_facts, device_names
from torchaccel.cost.facts import UNITS, DeviceFacts
from torchaccel.cost.measure import facts_for, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", device_names())
def test_every_row_is_whole(name: str) -> None:
    facts = device_facts(name)
    assert facts.cache_gbs > facts.dram_gbs > facts.processor_gbs > 0
    assert facts.processor_gbs * facts.processors > facts.dram_gbs
    assert {"float32", "bfloat16", "float16", "int8"} == set(dict(facts.gflops))
    assert all(facts.source_of(fact) for fact in UNITS)
    assert not facts.is_measured


@pytest.mark.parametrize("name", ["h200", "H200", "NVIDIA H200", "h200-sxm", "H200 SXM"])
def test_names_are_read_loosely(name: str) -> None:
    assert device_facts(name).name == "H200 SXM"


def test_an_unknown_device_is_told_its_neighbour_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown device 'h20'; the nearest is 'h200'. Known: a100, .*mi300x"):
        device_facts("h20")
    with pytest.raises(ValueError, match="Known: a100"):
        facts_for("abacus")


def test_rates_are_dense() -> None:
    # The sheets of H100 and H200 name 1979 TFLOP/s with 2:4 sparsity.
    for name in ("h100", "h200"):
        assert device_facts(name).rate("bfloat16") == pytest.approx(989.4e3)
        assert "half" in device_facts(name).source_of("gflops")
    assert device_facts("a100").rate("bfloat16") == 312e3


def test_facts_survive_json() -> None:
    for name in device_names():
        facts = device_facts(name)
        assert DeviceFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_other_documents_are_no_facts() -> None:
    found = device_facts("h200").to_dict()
    with pytest.raises(ValueError, match="launch_us"):
        DeviceFacts.from_dict({key: value for key, value in found.items() if key != "launch_us"})
    with pytest.raises(ValueError, match="measure again"):
        DeviceFacts.from_dict(found | {"dram_gbs": "fast"})


def test_a_fact_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no fact 'speed'"):
        device_facts("h200").source_of("speed")


def test_measuring_this_machine() -> None:
    facts = measure(CPU, megabytes=16, scale=0.1)
    assert facts.is_measured and facts.kind == "cpu" and facts.processors == torch.get_num_threads()
    assert facts.dram_gbs > 0 and facts.launch_us > 0 and facts.fork_us > 0
    assert facts.source_of("dram_gbs") == "measured"
    assert DeviceFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_measuring_leaves_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    measure(CPU, megabytes=4, scale=0.05)
    assert torch.get_num_threads() == before


def test_measured_facts_are_kept_by_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, dict[str, object]] = {}
    measured = replace(device_facts("avx2"), source="measured")
    calls = []
    monkeypatch.setattr("torchaccel.cost.measure.measure", lambda device: calls.append(device) or measured)
    for _ in range(2):
        assert facts_for("cpu", kept.get, kept.__setitem__) == measured
    assert calls == [CPU]
    (name,) = kept
    kept[name] = {"damaged": True}
    assert facts_for("cpu", kept.get, kept.__setitem__) == measured
    assert len(calls) == 2


def test_a_device_of_the_table_is_never_measured() -> None:
    assert facts_for("h200", load=lambda name: pytest.fail("asked for")) is device_facts("h200")
