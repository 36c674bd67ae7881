"""Every KV-compression method at several sizes of the cache: what it keeps of a text, drawn and as a table.

    python benchmarks/kv_budgets.py --text novels/ --calibration other_novels/ \\
        --json benchmarks/results/kv-budgets-demo.json --plot docs/kv_budgets.svg --table docs/kv_budgets.md

Each window is a prompt of 960 tokens and 64 that are read behind it. Methods that drop tokens get budgets with which
the buffers that are allocated in the end have 1/2, 1/4 and 1/8 of the slots of the exact cache; random eviction with
the same ones is the floor. Methods that shorten tokens are taken as they are, and behind an eviction.

Every method is a part of its own, in a document below ``--parts``: an interrupted run goes on there, and several
processes can share the work by ``--methods``, all but the last with ``--no-merge``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from kv_budgets_page import draw, tabulate

import torchaccel
from torchaccel.evaluation.evaluate import run_evaluate
from torchaccel.evaluation.evaluation import evaluation_variants, open_evaluation
from torchaccel.evaluation.machine import measure_machine
from torchaccel.evaluation.models import LoadedModel, load_model
from torchaccel.evaluation.results import write_document
from torchaccel.evaluation.tasks.run import EvaluateCase
from torchaccel.evaluation.texts import cut_windows, read_texts
from torchaccel.evaluation.variants import torchaccel_variants

WINDOW, READ = 1024, 64
SHARES = (0.5, 0.25, 0.125)
# Calls between evictions, the same for all that evict while decoding.
INTERVAL = 16
# Keep what the prompt leaves them; the tokens that are read come on top.
GROWING = ("random", "snapkv", "pyramidkv", "adakv", "expected_attention", "mpcache", "loopserve")
# Evict while decoding as well.
BOUNDED = ("random", "streaming_llm", "h2o", "tova", "critic", "lazy_eviction")
# Options beside the budget; a method is taken with each of several.
OWN: Mapping[str, tuple[dict[str, Any], ...]] = {
    "mpcache": ({"dense_layers": 0},),
    "loopserve": ({"interval": INTERVAL},),
    "critic": ({"interval": INTERVAL},),
    "lazy_eviction": ({"window": INTERVAL},),
    "expected_attention": ({}, {"recent": 0.0, "value_norm": True}),
}
# Tokens of the demo model that end a sentence: . ! ? line breaks and ."
SENTENCE_ENDS = (15, 2, 32, 200, 762, 376)


def main() -> None:
    """Parse the arguments, evaluate the parts that are not there yet, put them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, or a folder of them, to read")
    parser.add_argument("--calibration", type=Path, help="other text, for cskv, which is left out without")
    parser.add_argument("--methods", default="", help="only the parts of these names, by commas")
    parser.add_argument("--windows", type=int, default=8, help="of the text")
    parser.add_argument("--batch", type=int, default=2, help="windows, and questions, at a time")
    parser.add_argument("--parts", type=Path, default=Path("build/kv_budgets"), help="folder of the finished parts")
    parser.add_argument("--no-merge", action="store_true", help="make the parts, and nothing of them")
    parser.add_argument("--json", type=Path, help="the results document")
    parser.add_argument("--plot", type=Path, help="write a figure, its suffix names the format")
    parser.add_argument("--table", type=Path, help="a Markdown file, whose table between the marks is replaced")
    asked = parser.parse_args()
    asked.parts.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in asked.methods.split(",") if name]
    paths = [path for name in parts(asked) if not wanted or name in wanted for path in [part(asked, name)]]
    if asked.no_merge:
        return
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    merged = documents[0] | {"command": ["python", *sys.argv]}
    merged["results"] = [row for document in documents for row in document["results"]]
    if asked.json:
        write_document(merged, asked.json)
    if asked.plot:
        draw(merged, asked.plot)
    if asked.table:
        tabulate(merged, asked.table, "kv_budgets.py")


def parts(asked: argparse.Namespace) -> dict[str, list[Any]]:
    """What is asked of ``kv_compression``, one after another, by the name of the part; None for the exact cache."""
    found: dict[str, list[Any]] = {"exact": [None], "random": list(evicting("random"))}
    for name in (*BOUNDED[1:], *GROWING[1:]):
        found[name] = list(evicting(name))
    found["sentence_kv"] = [{"method": "sentence_kv", "tokens": 138, "ends": list(SENTENCE_ENDS)}]
    found |= {name: [{"method": name}] for name in ("int8", "int4", "int2", "gear", "turboquant")}
    found["turboquant"] += [{"method": "turboquant", "key_bits": bits, "value_bits": 2} for bits in (4, 2)]
    found["zipcache"] = [{"method": "zipcache", "interval": 32, "ratio": ratio} for ratio in (0.4, 0.8)]
    found["compositions"] = [
        [{"method": "snapkv", "tokens": growing(share)}, {"method": name}]
        for share, name in ((0.5, "int8"), (0.5, "int4"), (0.5, "turboquant"), (0.25, "turboquant"))
    ]
    if asked.calibration:
        found["cskv"] = [
            {"method": "cskv", "plan": str(asked.parts / f"cskv{n}.plan"), "key_density": share, "value_density": share}
            for n, share in enumerate(SHARES[:2])
        ]
    return found


def evicting(name: str) -> Iterator[dict[str, Any]]:
    """The method at all shares; random eviction both ways."""
    for own, share in ((own, share) for own in OWN.get(name, ({},)) for share in SHARES):
        if name in GROWING:
            yield {"method": name, "tokens": growing(share), **own}
        if name in BOUNDED:
            late = {"decoding": True, "interval": INTERVAL} if name == "random" else own
            # A buffer has a sixteenth of slack above what is stored, up to a multiple of 64.
            yield {"method": name, "tokens": int(share * WINDOW) - 24 - (8 if share == 0.5 else 0), **late}


def growing(share: float) -> int:
    """Tokens of the prompt that leave room for those that come on top."""
    return int(share * WINDOW) - READ


def part(asked: argparse.Namespace, name: str) -> Path:
    """The document of a part, made unless it is there."""
    path: Path = asked.parts / f"{name}.json"
    case = EvaluateCase(
        tasks=("perplexity", "recall"),
        window=WINDOW,
        prompt=WINDOW - READ,
        windows=asked.windows,
        batch=asked.batch,
        lengths=(WINDOW - READ,),
        questions=asked.batch,
        text=asked.text.name,
    )
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["case"] != case.to_dict():
            raise SystemExit(f"{path} was made with other settings; remove it, or name another folder with --parts")
        return path
    variants = parts(asked)[name]
    loaded = load_model("demo", dtype=torch.float32, device="cpu")
    if name == "cskv":
        calibrate(loaded, asked.calibration, variants)
    options = [{"kv_compression": one} for one in variants if one is not None]
    chosen = evaluation_variants([{}]) if name == "exact" else torchaccel_variants(options)
    session = open_evaluation(loaded, case, measure_machine(torch.device("cpu")), Printed(name))
    journal = path.with_suffix(".partial")
    run_evaluate(case, read_texts(asked.text), chosen, session, [], journal, lambda found: write_document(found, path))
    return path


def calibrate(loaded: LoadedModel, text: Path, variants: list[dict[str, Any]]) -> None:
    """Make the plans that ``variants`` name."""
    batches = cut_windows(read_texts(text), loaded.tokenizer, WINDOW, 32).split(4)
    for one in variants:
        options = {name: value for name, value in one.items() if name not in ("method", "plan")}
        torchaccel.calibrate(loaded.model, one["method"], batches, options).save(one["plan"])


class Printed:
    """Progress as lines of text."""

    def __init__(self, part: str) -> None:
        self._part = part

    def begin(self, steps: int) -> None:
        """The number of steps."""
        print(f"{self._part}: {steps} steps", flush=True)

    def advance(self, doing: str) -> None:
        """What comes next."""
        print(f"{self._part}: {doing}", flush=True)


if __name__ == "__main__":
    main()
