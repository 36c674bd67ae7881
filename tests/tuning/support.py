"""Records and specs that the tests of the tuning cache share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec

from torchaccel.tuning.fingerprint import Fingerprint
from torchaccel.tuning.key import Key
from torchaccel.tuning.record import Failure, Record, Timing

HERE = Path(__file__).parent
DENSE = KVFormat("dense", "float32", 32)
DECODE = AttentionSpec("decode", 32, 2, "float32", DENSE, DENSE, 32**-0.5)
LINEAR = LinearSpec("float32", 1, False)
SHAPE = {"M": 1, "K": 8, "N": 8}
MACHINE = Fingerprint("Some CPU", 2, "avx2", "2.13.0", "3.9.0", "g++ 12", "0.1.0+abc")
KEY = Key.of(LINEAR, SHAPE, MACHINE)

# What tests/tuning/fake_worker.py does under these names; the tuner cannot tell them from kernels.
GOOD, SLOW = Candidate("reference"), Candidate("composed", (("pause_ms", 20),))
WRONG, NAN = Candidate("cpp", (("fault", "wrong"),)), Candidate("cpp", (("fault", "unwritten"),))
CRASHING, EXITING = Candidate("cpp", (("fault", "crash"),)), Candidate("cpp", (("fault", "raise"),))
HANGING, BROKEN = Candidate("cpp", (("fault", "hang"),)), Candidate("cpp", (("fault", "compile"),))


def timing(candidate: str = "cpp", ms: float = 1.5, key: Key = KEY, at: float = 1e9) -> Record:
    """A candidate that took ``ms``."""
    return Record(key, candidate, Timing(ms, (ms, ms), 1e-6), at)


def failure(candidate: str = "cpp", key: Key = KEY) -> Record:
    """A candidate that crashed."""
    return Record(key, candidate, Failure("crashed", "SIGSEGV"), 1e9)


def elsewhere(key: Key = KEY) -> Key:
    """The key on another device."""
    return replace(key, fingerprint=replace(key.fingerprint, device="Another CPU", units=8))
