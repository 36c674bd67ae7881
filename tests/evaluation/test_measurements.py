"""Memory peaks, machine rates, logits distances."""

from __future__ import annotations

import torch

from torchaccel.cost.probe import ReadProbe
from torchaccel.evaluation.fidelity import compare_logits, equal_share, greedy_prefix
from torchaccel.evaluation.machine import measure_machine, versions
from torchaccel.evaluation.memory import transient_peak

CPU = torch.device("cpu")


def test_the_peak_counts_what_lives_at_the_same_time() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(2000, dtype=torch.float32)
        del first, second
        torch.empty(500, dtype=torch.float32)

    assert transient_peak(call, CPU) == 12_000


def test_what_a_call_replaces_counts_only_while_both_exist() -> None:
    cache = [torch.empty(1000), torch.empty(1000)]

    def grow() -> None:
        for layer in range(2):
            cache[layer] = torch.empty(1000)

    assert transient_peak(grow, CPU) == 4000


def test_what_existed_before_is_not_counted() -> None:
    held = torch.empty(10_000)
    assert transient_peak(lambda: held.add_(1.0), CPU) < 100


def test_the_machine_is_measured() -> None:
    machine = measure_machine(CPU, megabytes=8, gemm_size=128)
    facts = machine.to_dict()
    assert facts["device"] and facts["cores"] >= 1
    assert min(facts["read_gbs"], facts["copy_gbs"], *facts["gemm_gflops"].values()) > 0
    assert set(facts["gemm_gflops"]) == {"float32", "bfloat16"}


def test_the_probe_reads_all_of_its_memory() -> None:
    assert ReadProbe(CPU, 8).size == 8 * 2**20
    assert ReadProbe(CPU, 8).gbs() > 0


def test_versions_name_everything_the_document_wants() -> None:
    assert set(versions()) == {"torchaccel", "torch", "triton", "transformers", "python", "compiler"}


def test_identical_logits_have_no_distance() -> None:
    logits = torch.randn(3, 50)
    found = compare_logits(logits, logits, logits + 0.5)
    assert (found.max_abs_err_vs_fp32, found.kl, found.top1) == (0.0, 0.0, 1.0)
    assert abs((found.eager_max_abs_err_vs_fp32 or 0) - 0.5) < 1e-6


def test_kl_is_in_nats_per_token() -> None:
    truth = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    p = torch.full((2,), 0.5)
    expected = (p * (p.log() - other[0].log_softmax(-1))).sum().item()
    assert abs((compare_logits(other, truth).kl or 0) - expected) < 1e-6


def test_agreement_of_tokens() -> None:
    ours, theirs = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4], [1, 2, 8, 4]])
    assert greedy_prefix(ours, theirs) == 2
    assert equal_share(ours, theirs) == 0.75
