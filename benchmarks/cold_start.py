"""Fresh processes from `import torchaccel` to the first token of the demo model: with a bundle, and without.

    python benchmarks/cold_start.py --json benchmarks/results/cold-start.json

Every process has an empty folder for Inductor's cache. What is compared: Inductor, cold; torchaccel, cold; torchaccel
with a bundle that was made before for prompts of the same length. The variants take turns, and the ratio is that of the
medians. Precompiled headers of an earlier compilation, which Inductor keeps elsewhere, speed the cold starts up, not
the bundle's, which compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VARIANTS = ("inductor", "torchaccel", "bundle")


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each variant")
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompt")
    parser.add_argument("--variants", default="inductor,bundle", help=f"some of {','.join(VARIANTS)}, commas between")
    parser.add_argument("--bundle", type=Path, help="a bundle of the demo model; one is made where none is given")
    parser.add_argument("--json", help="write the results to this file, - for stdout", default="-")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(first_token(arguments.child, arguments.tokens, arguments.bundle)))
        return
    found = measure(arguments.variants.split(","), arguments.rounds, arguments.tokens, arguments.bundle)
    text = json.dumps(found, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
    else:
        Path(arguments.json).write_text(text, encoding="utf-8")


def first_token(variant: str, tokens: int, bundle: Path | None) -> dict[str, Any]:
    """In a fresh process: seconds from the first import to the first token, and what was compiled on the way."""
    began = time.perf_counter()
    import torch

    import torchaccel
    from torchaccel.evaluation.models import load_model

    model = load_model("demo").model
    if variant == "inductor":
        model.compile()
    elif bundle is not None:
        torchaccel.compile(model, bundle=str(bundle), trust=True, strict=True)
    else:
        torchaccel.compile(model)
    ids = torch.arange(tokens)[None] % 100
    loaded = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    ended = time.perf_counter()
    from torch._dynamo.utils import counters

    return {
        "seconds": ended - began,
        "loading_seconds": loaded - began,
        "token": int(out[0, -1]),
        "inductor_hits": counters["inductor"]["fxgraph_cache_hit"],
        "inductor_misses": counters["inductor"]["fxgraph_cache_miss"],
        "binaries": _binaries(),
    }


def measure(variants: Sequence[str], rounds: int, tokens: int, bundle: Path | None) -> dict[str, Any]:
    """All rounds of all variants, in turn, and the ratio of the bundle to Inductor."""
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None and "bundle" in variants:
            bundle = Path(folder) / "demo.bundle"
            _create(bundle, tokens, Path(folder) / "tuning.sqlite")
        samples: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant in variants:
                samples[variant].append(_fresh(variant, tokens, bundle if variant == "bundle" else None))
        brought = 0 if bundle is None else _brought(bundle)
    medians = {variant: statistics.median(s["seconds"] for s in found) for variant, found in samples.items()}
    return {
        "benchmark": "cold_start",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "model": "demo",
        "tokens": tokens,
        "median_seconds": medians,
        "bundle_over_inductor": _ratio(medians, "bundle", "inductor"),
        "binaries_in_bundle": brought,
        "samples": samples,
    }


def _ratio(medians: dict[str, float], a: str, b: str) -> float | None:
    return medians[a] / medians[b] if a in medians and b in medians else None


def _create(bundle: Path, tokens: int, cache: Path) -> None:
    command = ["bundle", "create", str(bundle), "--model", "demo", "--shapes", f"1x{tokens}", "--cache", str(cache)]
    _run(["-c", "from torchaccel.cli.app import app; app()", *command], None)


def _fresh(variant: str, tokens: int, bundle: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [__file__, "--child", variant, "--tokens", str(tokens)]
        answer = _run([*command, *(["--bundle", str(bundle)] if bundle else [])], folder)
    return json.loads(answer.splitlines()[-1])  # type: ignore[no-any-return]


def _run(arguments: Sequence[str], inductor_cache: str | None) -> str:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if inductor_cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = inductor_cache
    found = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{' '.join(arguments[:4])} failed:\n{found.stderr[-4000:]}")
    return found.stdout


def _binaries() -> int:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return len(list(Path(folder).glob("??/*.so"))) if folder else 0


def _brought(bundle: Path) -> int:
    from torchaccel.tuning.bundle import read_bundle

    return sum(name.endswith(".so") for name in read_bundle(bundle).kernels)


def _machine() -> dict[str, Any]:
    import torch

    from torchaccel.tuning.fingerprint import fingerprint

    return fingerprint(torch.device("cpu")).to_dict()


if __name__ == "__main__":
    main()
