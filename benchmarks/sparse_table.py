"""Every sparse-attention method on one model: what part it reads, how much faster it is, and what it loses.

    python benchmarks/sparse_table.py --json benchmarks/results/sparse-demo.json --markdown docs/methods.md

Methods read about an eighth of the tokens, those that go by a share of the attention their default one. Times are those
of ``torchaccel bench generate``, of a real prompt and the steps behind it: what methods that retrieve remember of a
prompt, the random cache of ``bench decode`` has not. Loss is that of ``torchaccel evaluate``. Methods that need a plan
are left out without ``--plan``. The documents of the two commands lie beside the table's (suffixes .times and .losses);
one that is there already is not made again. ``--table-only`` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchaccel.passes.lowering.lowered import LoweredSite
from torchaccel.passes.sparse_attention import METHODS

import torchaccel
from torchaccel.cost.symbols import visible_pairs
from torchaccel.evaluation.models import load_model

PART = 8
BEGIN, END = "<!-- sparse attention, measured -->", "<!-- end of sparse attention, measured -->"


def main() -> None:
    """Parse the arguments, measure unless told not to, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a folder in the Hugging Face format")
    parser.add_argument("--methods", default="", help="only these, by commas")
    parser.add_argument("--plan", action="append", default=[], help="METHOD=FILE, a calibration plan; repeatable")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--quick", action="store_true", help="as little as shows that everything runs")
    parser.add_argument("--json", type=Path, required=True, help="the results document")
    parser.add_argument("--markdown", type=Path, help="a document whose table between two comments is replaced")
    parser.add_argument("--table-only", action="store_true", help="read the document instead of measuring")
    arguments = parser.parse_args()
    if not arguments.table_only:
        chosen = arguments.methods.split(",") if arguments.methods else None
        plans = dict(one.split("=", 1) for one in arguments.plan)
        asked = [one for one in variants(arguments.context, plans) if chosen is None or one["method"] in chosen]
        document = measure(arguments, asked)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = table(json.loads(arguments.json.read_text(encoding="utf-8")))
    if arguments.markdown:
        insert(arguments.markdown, text)
    else:
        print(text)


def variants(context: int, plans: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What is asked of ``sparse_attention``, one after another; an eighth of ``context`` where a method has a size."""
    size = max(context // PART, 8)
    window = {"sinks": 4, "window": size - 4}
    known: dict[str, list[dict[str, Any]]] = {
        "streaming_llm": [window],
        "sliding_window": [{"window": size}],
        "a_shape": [window],
        "longgen": [window, {"pattern": "strided", "window": 64, "stride": PART}],
        "duo_attention": [{}],
        "flex_prefill": [{"min_budget": size, "block": 64}],
        "minference": [{"vertical": size // 2, "slash": size // 2}],
        "video_xl": [{"chunk": 64, "previous": 1}],
        "xattention": [{"block": 64}],
    }
    for method in METHODS:
        if method.phases == {"encoder"}:
            continue  # it leaves a decoder as it is
        fields = method.Options.model_fields
        # Of a method that is not listed: its budget by its usual names, and no layers that stay dense.
        usual = {name: size for name in ("tokens", "budget") if name in fields}
        usual |= {"dense_layers": 0} if "dense_layers" in fields else {}
        if method.name in plans:
            usual["plan"] = plans[method.name]
        elif method.calibration == "required":
            print(f"{method.name} is left out: give --plan {method.name}=FILE", file=sys.stderr)
            continue
        for own in known.get(method.name, [{}]):
            yield {"method": method.name, **usual, **own}


def measure(arguments: argparse.Namespace, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Run both commands over all variants; the results by variant, beside the part that each one read."""
    # What pays only for longer texts is shown all the same.
    options: list[dict[str, Any]] = [{}, *({"sparse_attention": one, "gate": False} for one in asked)]
    given = [part for one in options for part in ("--options", json.dumps(one))]
    quick = arguments.quick
    timing = ["--context", str(arguments.context), "--baselines", "eager", "--warm"]
    timing += ["--calls", "1", "--warmup", "0", "--new-tokens", "4", "--recall", "0"] if quick else []
    protocol = ["--tasks", "perplexity,recall", "--window", str(arguments.context), "--lengths", str(arguments.context)]
    protocol += ["--prompt", str(arguments.context * 13 // 16)]
    protocol += ["--windows", "1", "--questions", "1", "--batch", "1", "--new-tokens", "2"] if quick else []
    documents = {
        name: run(["torchaccel", *command, "--model", arguments.model, *given], arguments.json.with_suffix(f".{name}"))
        for name, command in (("times", ["bench", "generate", *timing]), ("losses", ["evaluate", *protocol]))
    }
    rows = []
    for one in options:
        found = {name: result_of(document, one) for name, document in documents.items()}
        rows.append({"options": one, "read": parts_read(arguments.model, one, arguments.context), **found})
    times = documents["times"]
    return {"context": arguments.context, "rows": rows, **{k: v for k, v in times.items() if k != "results"}}


def run(command: list[str], path: Path) -> dict[str, Any]:
    """The document of a command of this environment; one that is there already is taken as it is.

    A variant that fails is a row that says so, and a status: the others are wanted all the same.
    """
    if not path.exists():
        program = str(Path(sys.executable).with_name(command[0]))
        status = subprocess.run([program, *command[1:], "--json", str(path)]).returncode
        if not path.exists():
            raise SystemExit(status)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def result_of(document: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The result of torchaccel with ``options``."""
    for row in document["results"]:
        if row["variant"].startswith("torchaccel") and row["options"] == options:
            return dict(row)
    found = [row["variant"] for row in document["results"]]
    raise SystemExit(f"no result for {json.dumps(options)}; found {found}: delete the document and measure again")


def parts_read(model: str, options: dict[str, Any], context: int) -> dict[str, float]:
    """The part of the causal pairs that a prompt of ``context`` tokens read, and of the tokens that a step read."""
    fast = torchaccel.compile(load_model(model).model, **options)
    ids = torch.randint(3, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = fast(ids, use_cache=True).past_key_values
        fast(ids[:, :1], past_key_values=cache, use_cache=True)
    found = {}
    for record in torchaccel.report(fast).records:
        shares = [float(share) for share in record.counter.shares]
        parts = [part_read(site, context, record.phase == "prefill") for site in record.sites]
        chosen = sum(bool(site.selector) for site in record.sites)
        assert len(shares) in (0, chosen)
        parts = [part for part, site in zip(parts, record.sites, strict=True) if not (site.selector and shares)]
        found[record.phase] = round(sum(parts + shares) / max(len(parts + shares), 1), 4)
    return found


def part_read(site: LoweredSite, tokens: int, prompt: bool) -> float:
    """The part of ``tokens`` that a site reads by its window or its lists."""
    if site.listed is not None:
        return min(1.0, site.listed / tokens + site.listed_share)
    if site.window is None:
        return 1.0
    if prompt:
        part = visible_pairs(tokens, tokens, True, site.window, site.sinks)
        part /= visible_pairs(tokens, tokens, True, None, 0)
    else:
        part = min(1.0, (site.window + site.sinks) / tokens)
    bound = 1.0 if site.bound is None else sum(site.bound) / len(site.bound)
    return bound * part + 1 - bound


def table(document: dict[str, Any]) -> str:
    """The rows in Markdown; speed-ups are over torchaccel without a method."""
    exact = next(row for row in document["rows"] if not row["options"])
    lines = [
        f"Prompts of {document['context']} tokens:",
        "",
        "| method | prompt reads | step reads | prompt faster | step faster | perplexity over float32 | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        asked = row["options"].get("sparse_attention")
        named = "exact" if asked is None else f"`{asked['method']}`"
        named += "".join(f" {key} {value}" for key, value in (asked or {}).items() if key not in ("method", "plan"))
        read = [f"{row['read'].get(phase, 1.0):.2f}" for phase in ("prefill", "decode")]
        gained = [faster(exact, row, of) for of in ("ttft_ms", "tpot_ms")]
        fidelity = row["losses"]["fidelity"]
        recall = list((fidelity["recall"] or {}).values())
        lost = [f"{fidelity['perplexity_ratio']:.4f}" if fidelity["perplexity_ratio"] else "-"]
        lost += [f"{sum(recall) / len(recall):.2f}" if recall else "-"]
        lines.append(f"| {' | '.join([named, *read, *gained, *lost])} |")
    return "\n".join(lines)


def faster(exact: dict[str, Any], row: dict[str, Any], of: str) -> str:
    """How many times faster a row is than the exact one."""
    mine, theirs = row["times"][of], exact["times"][of]
    return "-" if mine is None or theirs is None else f"{theirs['median'] / mine['median']:.2f}x"


def insert(path: Path, text: str) -> None:
    """Put ``text`` between the two comments of a document; raises ``SystemExit`` where they are not."""
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no lines {BEGIN!r} and {END!r}: add them where the table belongs")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
