"""Every policy that evicts, against random eviction of the same size, without the compiler.

    python benchmarks/kv_policies.py --text novels/ --json benchmarks/results/kv-policies-demo.json \\
        --plot docs/kv_policies.svg --table docs/kv_budgets.md

The policies are those that the compiler installs, the budgets those of ``kv_budgets.py``. Here transformers runs the
demo model in float32 and one prefill serves all of them, which takes a twentieth of the time. ``kv_bytes`` are of the
tokens held, not of buffers. Prefill, selection (``mpcache``) and restoring (``loopserve``) are exact or left out.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from kv_budgets import BOUNDED, GROWING, READ, WINDOW, evicting
from kv_budgets_page import draw, name_of, tabulate
from policy_cache import PolicyCache, Prefilled, prefill, prepare, step
from torch import Tensor
from torchaccel.passes.kv_compression import METHODS

from torchaccel.evaluation.intervals import paired_ratio
from torchaccel.evaluation.machine import measure_machine, versions
from torchaccel.evaluation.models import load_model, model_facts
from torchaccel.evaluation.recall import ANSWER_TOKENS, TASKS, make_question
from torchaccel.evaluation.results import write_document
from torchaccel.evaluation.texts import cut_windows, read_texts
from torchaccel.runtime.eviction import Eviction

PROMPT = WINDOW - READ
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KNOWN = {method.name: method for method in METHODS}


def main() -> None:
    """Parse the arguments, read and ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, or a folder of them, to read")
    parser.add_argument("--methods", default="", help="only these, by commas")
    parser.add_argument("--windows", type=int, default=16, help="of the text")
    parser.add_argument("--questions", type=int, default=2, help="of each of three tasks at each of five depths")
    parser.add_argument("--json", type=Path, required=True, help="the results document")
    parser.add_argument("--plot", type=Path, help="write a figure, its suffix names the format")
    parser.add_argument("--table", type=Path, help="a Markdown file, whose table between the marks is replaced")
    asked = parser.parse_args()
    torch.manual_seed(0)
    loaded = load_model("demo", dtype=torch.float32, device="cpu")
    machine = measure_machine(torch.device("cpu"))
    prepare(loaded.model)
    arms = [Arm(None, loaded.model)]
    wanted = asked.methods.split(",") if asked.methods else dict.fromkeys((*BOUNDED, *GROWING))
    arms += [Arm(one, loaded.model) for name in wanted for one in evicting(name)]
    windows = cut_windows(read_texts(asked.text), loaded.tokenizer, WINDOW, asked.windows)
    case = {"kind": "policies", "window": WINDOW, "prompt": PROMPT, "windows": len(windows), "text": asked.text.name}
    found = {
        "command": ["python", *sys.argv],
        "versions": versions(),
        "machine": machine.to_dict(),
        "model": model_facts(loaded).to_dict(),
        "case": case | {"questions": asked.questions * len(DEPTHS) * len(TASKS)},
    }
    for part in windows.split(8):
        read(arms, part)
        print(f"read {len(arms[0].nll)} windows", file=sys.stderr, flush=True)
        write_document(found | {"results": [arm.row(arms[0]) for arm in arms]}, asked.json)
    ask(arms, loaded.tokenizer, asked.questions)
    found["results"] = [arm.row(arms[0]) for arm in arms]
    write_document(found, asked.json)
    if asked.plot:
        draw(found, asked.plot)
    if asked.table:
        tabulate(found, asked.table, "kv_policies.py")


class Arm:
    """A policy, or the exact cache for None, and what was found of it, window by window and question by question."""

    def __init__(self, options: Mapping[str, Any] | None, model: Any) -> None:
        self.options = {} if options is None else {"kv_compression": dict(options)}
        self.model = model
        self.nll: list[float] = []
        self.kl: list[float] = []
        self.top1: list[float] = []
        self.right: dict[str, list[float]] = {task.name: [] for task in TASKS}
        self.bytes = 0

    def policy(self) -> Eviction | None:
        """A new one."""
        if not self.options:
            return None
        given = dict(self.options["kv_compression"])
        method = KNOWN[given.pop("method")]
        found: Eviction = method(method.Options(**given)).policy()  # type: ignore[attr-defined]
        return found

    def cache(self, found: Prefilled) -> PolicyCache:
        """What the policy keeps of a prompt."""
        return PolicyCache(found, self.model.config.head_dim**-0.5, self.policy())

    def logits(self, found: Prefilled, tokens: Tensor) -> Tensor:
        """Of every token ``[B, n]`` that follows the prompt: ``[B, n, V]``."""
        cache, logits = self.cache(found), [found.logits]
        for token in tokens[:, :-1].split(1, 1):
            logits.append(step(self.model, cache, token))
        keys = found.keys[0]
        self.bytes = round(cache.held * len(cache) * keys.shape[0] * 2 * keys.shape[1] * keys.shape[3] * 4)
        return torch.stack(logits, 1).log_softmax(-1)

    def answer(self, found: Prefilled) -> Tensor:
        """The tokens ``[B, n]`` found most likely behind the prompt."""
        cache, tokens = self.cache(found), [found.logits.argmax(-1, keepdim=True)]
        while len(tokens) < ANSWER_TOKENS:
            tokens.append(step(self.model, cache, tokens[-1]).argmax(-1, keepdim=True))
        return torch.cat(tokens, 1)

    def row(self, exact: Arm) -> dict[str, Any]:
        """A row of the results document."""
        ratio, interval = paired_ratio([ours - truth for ours, truth in zip(self.nll, exact.nll, strict=True)])
        fidelity = {"perplexity": exp(mean(self.nll)), "perplexity_ratio": ratio, "perplexity_ratio_ci95": interval}
        fidelity |= {"kl": mean(self.kl), "top1": mean(self.top1)}
        fidelity |= {"recall": {name: mean(right) for name, right in self.right.items() if right}}
        row = {"options": self.options, "status": "ok", "kv_bytes": self.bytes, "fidelity": fidelity}
        windows = {"nll": self.nll, "kl": self.kl}
        return {"variant": f"policy:{name_of(row)}", **row, "details": {"windows": windows, "right": self.right}}


def read(arms: list[Arm], tokens: Tensor) -> None:
    """Score ``tokens`` ``[B, S]`` behind their prompts with every arm, the exact one first."""
    found, rest = prefill(arms[0].model, tokens[:, :PROMPT]), tokens[:, PROMPT:]
    truth = arms[0].logits(found, rest)
    for arm in arms:
        own = arm.logits(found, rest)
        arm.nll += (-own.gather(2, rest[..., None]).mean((1, 2))).tolist()
        arm.kl += ((truth.exp() * (truth - own)).sum(-1).mean(1)).tolist()
        arm.top1 += (own.argmax(-1) == truth.argmax(-1)).float().mean(1).tolist()


def ask(arms: list[Arm], tokenizer: Any, questions: int) -> None:
    """Ask every arm the questions that ``torchaccel evaluate`` asks."""
    for task, depth in ((task, depth) for task in TASKS for depth in DEPTHS):
        rng = random.Random(f"{task.name}/{PROMPT}/{depth}")
        asked = [make_question(tokenizer, task, PROMPT, rng, depth) for _ in range(questions)]
        found = prefill(arms[0].model, torch.tensor([question.tokens for question in asked]))
        for arm in arms:
            answers = arm.answer(found).tolist()
            arm.right[task.name] += [q.score(tokenizer, a) for q, a in zip(asked, answers, strict=True)]
        print(f"asked {task.name} at {depth}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
