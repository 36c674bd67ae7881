"""A worker whose candidates go wrong as their names say; run as a script by the tuner under test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torchaccel.kernels.candidates import Candidate, build

from torchaccel.tuning.worker import serve


def faulty(spec: Any, candidate: Candidate) -> Callable[..., Any]:
    """The reference of ``spec``, with the fault or the pause that ``candidate`` names."""
    config = dict(candidate.config)
    reference = build(spec, Candidate("reference"))
    fault = config.get("fault")
    # As compilers and native code do; answers must not drown in it.
    print("noise on stdout")
    os.write(1, b"more noise\n")
    if fault == "compile":
        raise RuntimeError("g++ kernel.cpp\nkernel.cpp:1:1: error: expected ';'")

    def run(*args: Any) -> Any:
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "raise":
            raise RuntimeError("the kernel gave up")
        if fault == "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            time.sleep(600)
        time.sleep(int(config.get("pause_ms", 0)) / 1e3)
        results = reference(*args)
        if fault == "wrong":
            results[0][0, 3] += 0.5
        if fault == "unwritten":
            # What is left of an allocation when one value is not written.
            unwritten = torch.empty_like(results[0])
            unwritten[:, 1:] = results[0][:, 1:]
            results[0] = unwritten
        return results

    return run


if __name__ == "__main__":
    serve(faulty)
