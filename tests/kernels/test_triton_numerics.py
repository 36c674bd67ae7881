"""Triton kernels against the float32 reference: in the interpreter everywhere, and on the GPU where there is one.

All cases of one kind share a process, and a failure lists the cases that went wrong.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.kernels.triton_support.decode_cases import DECODE_CASES
from tests.kernels.triton_support.fused_cases import FUSED_CASES
from tests.kernels.triton_support.gather_cases import GATHER_CASES
from tests.kernels.triton_support.linear_cases import LINEAR_CASES
from tests.kernels.triton_support.merge_cases import MERGE_CASES
from tests.kernels.triton_support.prefill_cases import PREFILL_CASES
from tests.kernels.triton_support.process import errors_of, run_in_parallel, run_module
from tests.kernels.triton_support.ragged_cases import RAGGED_CASES
from tests.kernels.triton_support.selection_cases import PROMPT_CASES, SELECTION_CASES, SUMMARY_CASES
from tests.kernels.triton_support.sparse_cases import SPARSE_MLP_CASES, THRESHOLD_CASES

pytest.importorskip("triton")

CASES = [case.name for case in [*DECODE_CASES, *PREFILL_CASES, *MERGE_CASES, *SUMMARY_CASES]]
CASES += [case.name for case in [*RAGGED_CASES, *SELECTION_CASES, *PROMPT_CASES, *FUSED_CASES, *LINEAR_CASES]]
CASES += [case.name for case in [*GATHER_CASES, *SPARSE_MLP_CASES, *THRESHOLD_CASES]]


def test_case_names_are_unique() -> None:
    assert len(set(CASES)) == len(CASES)


def test_interpreter_agrees_with_reference(tmp_path: Path) -> None:
    results = run_module("run_cases", "interpreter", cache=tmp_path, TRITON_INTERPRET="1")
    assert errors_of(results, CASES) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_reference(tmp_path: Path) -> None:
    processes = min(8, os.cpu_count() or 1)
    results = run_in_parallel("run_cases", "cuda", CASES, processes, tmp_path, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert errors_of(results, CASES) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_growing_cache_compiles_once(tmp_path: Path) -> None:
    results = run_module("growing_cache", cache=tmp_path)
    assert errors_of(results, ["dense", "int8", "window"]) == {}
