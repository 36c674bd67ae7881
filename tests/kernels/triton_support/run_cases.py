"""Run every case in this process and print one JSON line for each: ``python -m ... interpreter|cuda``."""

from __future__ import annotations

import json
import sys
import time
import traceback

import torch


def main(where: str) -> None:
    """``interpreter``: on the CPU (TRITON_INTERPRET=1 is set by the caller); ``cuda``: on the GPU."""
    if where == "interpreter":
        from tests.kernels.triton_support import interpreter_bfloat16

        interpreter_bfloat16.install()
        torch.set_num_threads(1)
    from tests.kernels.triton_support.decode_cases import DECODE_CASES, run_decode_case

    # Results are allocated full of NaN, so that what a kernel forgets to write is seen.
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if where == "cuda" else "cpu")
    only = sys.argv[2:]
    for case in DECODE_CASES:
        if only and case.name not in only:
            continue
        began = time.perf_counter()
        try:
            error = run_decode_case(case, device)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"case": case.name, "error": error, "seconds": round(time.perf_counter() - began, 2)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
