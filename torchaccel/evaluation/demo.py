"""The demonstration: the embedded model answers one question in every way, and a table shows what each way costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from .bench import Setup, open_session, session_document
from .fidelity import equal_share
from .generate import Generated, run_generate
from .recall import ANSWER_TOKENS, TASKS, Question, is_right, make_question
from .results import Result
from .session import Case, Progress, fresh_compilers
from .variants import Variant, parse_baselines, torchaccel_variants

# One lossy setting per family. The window is well below the prompt, so that what it forgets shows in the answers.
LOSSY: dict[str, Any] = {
    "layer_skipping": {"method": "unified", "target_speedup": 1.3},
    "token_pruning": {"method": "fastv", "keep": 0.5, "layer": 2},
    "kv_compression": {"method": "int8"},
    "sparse_attention": {"method": "streaming_llm", "sinks": 4, "window": 256},
}


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
        title = "One prompt, every way of running the model"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        table.add_column("variant", no_wrap=True)
        for name in ("first\ntoken ms", "ms per\ntoken", "KV\nkB", "same\nstart", "same\ntokens"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("answer", "recall", "graphs"):
            table.add_column(name, justify="right", no_wrap=True)
        titled = False
        for result in self.generated.results:
            if result.variant.startswith("torchaccel:") and not titled:
                table.add_row("torchaccel")
                titled = True
            table.add_row(*self._row(result))
        return table

    def legend(self) -> str:
        """What the columns of the table mean."""
        tasks = ", ".join(task.name.replace("_", " ") for task in TASKS)
        return (
            "KV kB: allocated by the cache at the end. same start: tokens before the first that differs from eager's. "
            "same tokens: share of tokens equal to eager's, place by place. answer: the one to the prompt. "
            f"recall: share of questions answered right ({tasks})."
        )

    def _row(self, result: Result) -> list[str]:
        tokens = self.generated.tokens.get(result.variant)
        ours = result.variant.startswith("torchaccel:")
        name = f"  {result.variant.removeprefix('torchaccel:')}" if ours else result.variant
        name = "  all together" if "+" in name else name
        if result.status == "declined":
            name += " (declined)"
        if tokens is None or result.ttft_ms is None or result.tpot_ms is None:
            return [name, result.reason or result.status] + [""] * 7
        reference = self.generated.reference
        right = is_right(self.tokenizer, tokens[0].tolist(), self.question.answer)
        scores = (result.fidelity.recall or {}).values()
        return [
            name,
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
