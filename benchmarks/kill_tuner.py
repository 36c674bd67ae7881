"""Kills a tuner at random moments, then lets many tune at once, and checks that the cache stays whole.

    python benchmarks/kill_tuner.py --kills 100 --processes 16 --json benchmarks/results/kill-tuner-cpu.json

A tuner of stock candidates of small linear layers and decode attentions is started again and again and killed (SIGKILL)
at a random moment, every other one of them once its first result is written; after each kill every row of the cache
must be valid, and everything known before must be known still. Then the processes tune into one new cache at the same
time, and it must hold every result once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec

from torchaccel.tuning.cache import TuningCache
from torchaccel.tuning.fingerprint import fingerprint
from torchaccel.tuning.tuner import Task, Tuner

CPU = torch.device("cpu")
DENSE = KVFormat("dense", "float32", 32)
DECODE = AttentionSpec("decode", 32, 2, "float32", DENSE, DENSE, 32**-0.5)
LISTED = (Candidate("reference"), Candidate("composed"))
# Pairs of tasks of one tuner: enough that most kills hit it at work.
PAIRS = 4


def main() -> None:
    """Parse the arguments, kill, check, print; the exit code is 1 when something was lost or damaged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="-", help="write the results to this file, - for stdout")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "benchmark": "kill_tuner",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": fingerprint(CPU).to_dict(),
            "seed": arguments.seed,
            "kills": kill(Path(folder) / "killed.sqlite", arguments.kills, random.Random(arguments.seed)),
            "together": together(Path(folder) / "together.sqlite", arguments.processes),
        }
    text = json.dumps(found, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
    else:
        Path(arguments.json).write_text(text, encoding="utf-8")
    raise SystemExit(0 if found["kills"]["whole"] and found["together"]["whole"] else 1)


def tune(path: Path, first: int, count: int) -> None:
    """Measure ``count`` pairs of tasks into the cache at ``path``; their sizes begin at ``first``."""

    def listed(spec: object, device: str) -> Sequence[Candidate]:
        return LISTED

    tasks = []
    for i in range(first, first + count):
        tasks.append(Task(LinearSpec("float32", 1, False), {"M": 1, "K": 8 + i, "N": 8}))
        tasks.append(Task(DECODE, {"B": 1, "H_kv": 1 + i, "Q": 1, "S": 64}))
    Tuner(TuningCache(path), CPU, candidates=listed).run(tasks)


def kill(path: Path, kills: int, numbers: random.Random) -> dict[str, Any]:
    """Kill a tuner ``kills`` times; each has sizes of its own, so that there is something left to measure.

    The moment is drawn from the time that an undisturbed one takes, or from a third of it, behind the first result. The
    document says how many were hit before their first result and between two, and how many had finished.
    """
    cache = TuningCache(path)
    began = time.monotonic()
    undisturbed = _start(path, 0, PAIRS)
    undisturbed.join()
    span = time.monotonic() - began
    known = set(cache.records())
    damaged = lost = starting = working = finished = 0
    for round_ in range(1, kills + 1):
        process = _start(path, PAIRS * round_, PAIRS)
        if round_ % 2:
            while process.is_alive() and len(cache.records()) == len(known):
                time.sleep(0.05)
        time.sleep(numbers.random() * (span / 3 if round_ % 2 else span))
        finished += not process.is_alive()
        process.kill()
        process.join()
        checked = cache.check()
        damaged += len(checked.invalid)
        lost += len(known - set(checked.records))
        starting += len(checked.records) == len(known)
        working += len(known) < len(checked.records) < len(known) + 2 * len(LISTED) * PAIRS
        known = set(checked.records)
        print(f"{round_} of {kills}: {len(known)} results, {damaged} damaged, {lost} lost", file=sys.stderr)
    return {
        "kills": kills,
        "span_seconds": round(span, 1),
        "before_the_first_result": starting,
        "between_results": working,
        "finished": finished,
        "entries": len(known),
        "damaged": damaged,
        "lost": lost,
        "whole": not damaged and not lost,
    }


def together(path: Path, count: int) -> dict[str, Any]:
    """``count`` processes tune into one file at once: half of their tasks are the same, half their own."""
    processes = [_start(path, first, 2) for first in range(count)]
    for process in processes:
        process.join()
    checked = TuningCache(path).check()
    keys = {(record.key, record.candidate) for record in checked.records}
    failed = sum(process.exitcode != 0 for process in processes)
    # Tasks first .. first + 1 of each: count + 1 distinct ones of two kernels, two candidates each.
    due = 4 * (count + 1)
    whole = not failed and not checked.invalid and len(keys) == len(checked.records) == due
    return {
        "processes": count,
        "failed": failed,
        "entries": len(keys),
        "due": due,
        "damaged": len(checked.invalid),
        "whole": whole,
    }


def _start(path: Path, first: int, count: int) -> Any:
    # A fork has imported everything; what measures is a process that every tuner starts for itself.
    process = multiprocessing.get_context("fork").Process(target=tune, args=(path, first, count))
    process.start()
    return process


if __name__ == "__main__":
    main()
