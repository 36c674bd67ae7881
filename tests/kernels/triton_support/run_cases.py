"""Run cases in this process and print one JSON line for each.

``python -m tests.kernels.triton_support.run_cases interpreter|cuda [case ...]``, "interpreter" with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch


def main(where: str, only: list[str]) -> None:
    """Run all cases, or those named in ``only``, on the CPU through Triton's interpreter or on the GPU."""
    if where == "interpreter":
        from . import interpreter_bfloat16

        interpreter_bfloat16.install()
        torch.set_num_threads(1)
    from .decode_cases import DECODE_CASES, run_decode_case
    from .fused_cases import FUSED_CASES, run_fused_case
    from .gather_cases import GATHER_CASES, run_gather_case
    from .linear_cases import LINEAR_CASES, run_linear_case
    from .merge_cases import MERGE_CASES, run_merge_case
    from .prefill_cases import PREFILL_CASES, run_prefill_case
    from .ragged_cases import RAGGED_CASES, run_ragged_case
    from .selection_cases import (
        PROMPT_CASES,
        SELECTION_CASES,
        SUMMARY_CASES,
        run_prompt_case,
        run_selection_case,
        run_summary_case,
    )
    from .sparse_cases import SPARSE_MLP_CASES, THRESHOLD_CASES, run_sparse_mlp_case, run_threshold_case

    # Results are allocated full of NaN, so that what a kernel forgets to write is seen.
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if where == "cuda" else "cpu")
    runs: list[tuple[str, Callable[[], str | None]]] = []
    runs += [(case.name, partial(run_decode_case, case, device)) for case in DECODE_CASES]
    runs += [(case.name, partial(run_ragged_case, case, device)) for case in RAGGED_CASES]
    runs += [(case.name, partial(run_prefill_case, case, device)) for case in PREFILL_CASES]
    runs += [(case.name, partial(run_merge_case, case, device)) for case in MERGE_CASES]
    runs += [(case.name, partial(run_summary_case, case, device)) for case in SUMMARY_CASES]
    runs += [(case.name, partial(run_selection_case, case, device)) for case in SELECTION_CASES]
    runs += [(case.name, partial(run_prompt_case, case, device)) for case in PROMPT_CASES]
    runs += [(case.name, partial(run_fused_case, case, device)) for case in FUSED_CASES]
    runs += [(case.name, partial(run_linear_case, case, device)) for case in LINEAR_CASES]
    runs += [(case.name, partial(run_gather_case, case, device)) for case in GATHER_CASES]
    runs += [(case.name, partial(run_sparse_mlp_case, case, device)) for case in SPARSE_MLP_CASES]
    runs += [(case.name, partial(run_threshold_case, case, device)) for case in THRESHOLD_CASES]
    for name, run in runs:
        if only and name not in only:
            continue
        began = time.perf_counter()
        try:
            error = run()
        except Exception:
            error = traceback.format_exc()
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps({"case": name, "error": error, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
