"""Kills a tuner at random moments, then lets many tune at once, and checks that the cache stays whole.

    python benchmarks/kill_tuner.py --kills 100 --processes 16 --json -

A tuner of real candidates of a small linear layer and a small decode attention is started again and again and killed
(SIGKILL) after a random time; after each kill every row of the cache must be valid, and everything known before must be
known still. Then the processes tune into one new cache at the same time, and it must hold every result once.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torchaccel.tuning.cache import TuningCache

# The shapes differ from kill to kill, so that there is always something left to measure.
TUNE = """
import sys
from pathlib import Path
import torch
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec
from torchaccel.tuning.cache import TuningCache
from torchaccel.tuning.tuner import Task, Tuner

first, count = int(sys.argv[2]), int(sys.argv[3])
dense = KVFormat("dense", "float32", 32)
decode = AttentionSpec("decode", 32, 2, "float32", dense, dense, 32**-0.5)
tasks = []
for i in range(first, first + count):
    tasks.append(Task(LinearSpec("float32", 1, False), {"M": 1, "K": 8 + i, "N": 8}))
    tasks.append(Task(decode, {"B": 1, "H_kv": 1 + i, "Q": 1, "S": 64}))
listed = [Candidate("reference"), Candidate("composed")]
tuner = Tuner(TuningCache(Path(sys.argv[1])), torch.device("cpu"), candidates=lambda spec, device: listed)
print("running", flush=True)
tuner.run(tasks)
"""


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
            "kills": kill(Path(folder) / "killed.sqlite", arguments.kills, random.Random(arguments.seed)),
            "together": together(Path(folder) / "together.sqlite", arguments.processes),
        }
    text = json.dumps(found, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
    else:
        Path(arguments.json).write_text(text, encoding="utf-8")
    raise SystemExit(0 if found["kills"]["whole"] and found["together"]["whole"] else 1)


def kill(path: Path, kills: int, numbers: random.Random) -> dict[str, Any]:
    """Kill a tuner ``kills`` times at random moments of its work."""
    cache = TuningCache(path)
    known: set[Any] = set()
    damaged = lost = 0
    for round_ in range(kills):
        process = _start(path, 20 * round_, 20)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(numbers.random() * 6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checked = cache.check()
        damaged += len(checked.invalid)
        lost += len(known - set(checked.records))
        known = set(checked.records)
    return {"rounds": kills, "results": len(known), "damaged": damaged, "lost": lost, "whole": not damaged and not lost}


def together(path: Path, count: int) -> dict[str, Any]:
    """``count`` processes tune into one file at once: half of their tasks are the same, half their own."""
    processes = [_start(path, first, 2) for first in range(count)]
    codes = [process.wait() for process in processes]
    checked = TuningCache(path).check()
    keys = {(record.key, record.candidate) for record in checked.records}
    # Tasks first .. first + 1 of each: count + 1 distinct ones of two kernels, two candidates each.
    due = 4 * (count + 1)
    whole = not any(codes) and not checked.invalid and len(keys) == len(checked.records) == due
    return {
        "processes": count,
        "failed": sum(code != 0 for code in codes),
        "results": len(keys),
        "due": due,
        "damaged": len(checked.invalid),
        "whole": whole,
    }


def _start(path: Path, first: int, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TUNE, str(path), str(first), str(count)], stdout=subprocess.PIPE)


if __name__ == "__main__":
    main()
