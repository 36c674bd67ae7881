"""Run a module of this package in a process of its own and collect the JSON lines it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def run_module(module: str, *arguments: str, cache: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """The lines that ``<module>`` printed, by case name; what it wrote to stderr when it failed early.

    Triton's interpreter and its compiler cannot share a process: each gets its own.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[3])
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "TORCHACCEL_CACHE_DIR": str(cache),
        "TRITON_CACHE_DIR": str(cache / "compiled"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", f"{__package__}.{module}", *arguments],
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    found: dict[str, dict[str, Any]] = {line["case"]: line for line in lines}
    if result.returncode:
        found[""] = {"error": result.stderr[-2000:]}
    return found


def run_in_parallel(
    module: str, where: str, cases: list[str], processes: int, cache: Path, **environment: str
) -> dict[str, dict[str, Any]]:
    """``run_module`` of all cases, dealt out to so many processes: on a GPU most of the time is the compiler's."""

    def run(first: int) -> dict[str, dict[str, Any]]:
        return run_module(module, where, *cases[first::processes], cache=cache / str(first), **environment)

    with ThreadPoolExecutor(processes) as pool:
        return {name: line for results in pool.map(run, range(processes)) for name, line in results.items()}


def errors_of(results: dict[str, dict[str, Any]], cases: list[str]) -> dict[str, str]:
    """What went wrong, by case; a case that never ran is an error too."""
    ended = f"the process ended before this case: {results.get('', {}).get('error')}"
    found = {case: results.get(case, {"error": ended})["error"] for case in cases}
    return {case: error for case, error in found.items() if error}
