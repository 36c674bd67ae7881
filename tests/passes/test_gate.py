"""Lossy sites that would be slower are declined, with the predicted numbers, unless the user insists."""

import pytest
import torch
from torchaccel.passes.lowering import gate

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt

pytestmark = pytest.mark.usefixtures("known_machine")


@pytest.fixture
def known_machine(monkeypatch, tmp_path):
    """Whatever machine this is, and whatever was measured on it: what a site is worth is predicted for this one."""
    monkeypatch.setattr("torchaccel.cost.assumed._instruction_set", lambda: "avx512_bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("TORCHACCEL_CACHE", str(tmp_path / "none.sqlite"))


# Heads of 16 channels: decoding their codes costs more than the bytes that it saves.
SLOWER = {"kv_compression": "int8", "gate": True}


def test_a_cache_that_no_length_makes_faster_stays_exact_and_says_so(monkeypatch):
    monkeypatch.setattr(gate, "WORTH", 1.0)
    _, fast = compiled("llama", dtype=torch.bfloat16, options=SLOWER)
    inputs = prompt(1, 70)
    with pytest.warns(UserWarning, match=r"left 3 site\(s\) exact.*int8 decode attention.*ms predicted"):
        greedy(fast, inputs, 3)
    report = torchaccel.report(fast)
    assert {site.layout for record in report.records for site in record.sites} == {"dense"}
    assert any("it pays at no length" in line and "gate=False" in line for line in report.declines)


def test_strict_raises_instead(monkeypatch):
    monkeypatch.setattr(gate, "WORTH", 1.0)
    _, fast = compiled("llama", dtype=torch.bfloat16, options={**SLOWER, "strict": True})
    with pytest.raises(Exception, match=r"DeclinedError.*it pays at no length"):
        greedy(fast, prompt(1, 70), 2)


def test_what_pays_is_kept_and_the_report_names_the_length():
    _, fast = compiled("llama", options=SLOWER)  # float32: half the bytes are a quarter now
    greedy(fast, prompt(1, 70), 2)
    record = torchaccel.report(fast).records[0]
    assert {site.layout for site in record.sites} == {"int8"}
    assert "it pays from" in record.sites[0].gate


def test_fewer_bytes_are_worth_some_time():
    _, fast = compiled("llama", dtype=torch.bfloat16, options={**SLOWER, "strict": True})
    greedy(fast, prompt(1, 70), 2)
    record = torchaccel.report(fast).records[0]
    assert {site.layout for site in record.sites} == {"int8"} and "it pays at no length" in record.sites[0].gate


def test_gate_off_keeps_it():
    _, fast = compiled("llama", dtype=torch.bfloat16, options={**SLOWER, "gate": False})
    greedy(fast, prompt(1, 70), 2)
    assert {site.layout for record in torchaccel.report(fast).records for site in record.sites} == {"int8"}
