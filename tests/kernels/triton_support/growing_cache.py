"""Count compilations on the GPU while a cache grows: ``python -m tests.kernels.triton_support.growing_cache``."""

from __future__ import annotations

import json

import torch
from torchaccel.kernels.triton.decode_source import generate
from torchaccel.kernels.triton.source import load

from .decode_cases import DecodeCase, run_decode_case

# The splits stay the same: whether a call is split is the one thing about its length that a kernel is compiled for.
CASES = [
    DecodeCase("dense"),
    DecodeCase("int8", keys="int8", values="int8"),
    DecodeCase("window", window=64, sinks=4, mask="bool"),
]


def main() -> None:
    """Run each case at many lengths; every further compiled variant is an error."""
    device = torch.device("cuda")
    for case in CASES:
        errors = []
        counts = []
        for end in (1, 16, 31, 128, 1000, 1001, 4096):
            fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
            errors.append(run_decode_case(DecodeCase(**fields | {"end": end}), device))
            kernel = load(generate(case.spec()), "decode_attention").attend
            counts.append(len(kernel.device_caches[torch.cuda.current_device()][0]))
        if counts[0] != counts[-1]:
            errors.append(f"compiled variants grew with the length: {counts}")
        print(json.dumps({"case": case.name, "error": next(filter(None, errors), None)}), flush=True)


if __name__ == "__main__":
    main()
