"""The demonstration: the embedded model answers one question in every way, and a table shows what each way costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from .bench import Setup, open_session, session_document
from .fidelity import equal_share
from .generation import Generated, run_generate
from .recall import ANSWER_TOKENS, TASKS, Question, is_right, make_question
from .results import Result
from .runners import parse_baselines
from .session import Case, Progress, fresh_compilers
from .tables import PREFIX, comparison_table
from .variants import Variant, torchaccel_variants

# One lossy setting per family. The window is well below the prompt, so that what it forgets shows in the answers.
LOSSY: dict[str, Any] = {
    "layer_skipping": {"method": "unified", "target_speedup": 1.3},
    "token_pruning": {"method": "fastv", "keep": 0.5, "layer": 2},
    "kv_compression": {"method": "int8"},
    "sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 256},
}
ALL_TOGETHER = f"{PREFIX}all together"


@dataclass(frozen=True)
class Demo:
    """A finished demonstration: the question, what every variant generated, and the results document."""

    question: Question
    prompt_tail: str
    generated: Generated
    document: dict[str, Any]
    tokenizer: Any

    def table(self) -> Table:
        """One row per variant: times, bytes, agreement with eager, answers, graphs."""
        headers = ["first\ntoken ms", "ms per\ntoken", "KV\nkB", "same\nstart", "same\ntokens"]
        headers += ["answer", "recall", "graphs"]
        rows = [self._row(result) for result in self.generated.results]
        return comparison_table("One prompt, every way of running the model", headers, rows)

    def legend(self) -> str:
        """What the columns of the table mean."""
        tasks = ", ".join(task.name.replace("_", " ") for task in TASKS)
        return (
            "KV kB: allocated by the cache at the end. same start: tokens before the first that differs from eager's. "
            "same tokens: share of tokens equal to eager's, place by place. answer: the one to the prompt. "
            f"recall: share of questions answered right ({tasks})."
        )

    def _row(self, result: Result) -> tuple[str, list[str]]:
        name = ALL_TOGETHER if "+" in result.variant else result.variant
        if result.status != "ok":
            name += f" ({result.status})"
        tokens = self.generated.tokens.get(result.variant)
        if tokens is None or result.ttft_ms is None or result.tpot_ms is None:
            return name, []
        reference = self.generated.reference
        right = is_right(self.tokenizer, tokens[0].tolist(), self.question.answer)
        scores = (result.fidelity.recall or {}).values()
        return name, [
            f"{result.ttft_ms.median:.1f}",
            f"{result.tpot_ms.median:.2f}",
            f"{(result.kv_bytes or 0) / 1e3:.0f}",
            f"{result.fidelity.greedy_prefix}/{reference.shape[1]}",
            f"{equal_share(tokens, reference):.0%}",
            "right" if right else "wrong",
            f"{sum(scores) / len(scores):.0%}" if scores else "-",
            "-" if result.graphs is None else str(result.graphs),
        ]


def demo_variants() -> list[Variant]:
    """Eager, Inductor, torchaccel exact, each lossy setting alone, and all of them together."""
    alone = [{family: options} for family, options in LOSSY.items()]
    return [*parse_baselines("eager,inductor"), *torchaccel_variants([{}, *alone, LOSSY])]


def run_demo(
    case: Case,
    setup: Setup,
    command: Sequence[str],
    progress: Progress | None = None,
    *,
    variants: Sequence[Variant] = (),
) -> Demo:
    """Run all variants on a question of eight facts in ``case.context`` tokens of text."""
    session = open_session(case, setup, progress)
    tokenizer = session.loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"the demo asks a question in words, and model {setup.model!r} has no tokenizer.json")
    question = make_question(tokenizer, TASKS[1], case.context, random.Random(0))
    prompt = torch.tensor([question.tokens], device=session.device)
    with fresh_compilers(cold=setup.cold):
        generated = run_generate(session, variants or demo_variants(), prompt)
    return Demo(
        question=question,
        prompt_tail=tokenizer.decode(question.tokens[-40:]),
        generated=generated,
        document=session_document(session, generated.results, command),
        tokenizer=tokenizer,
    )


def answer_text(demo: Demo) -> str:
    """What eager answers to the demo's question."""
    return demo.tokenizer.decode(demo.generated.reference[0, :ANSWER_TOKENS].tolist())
