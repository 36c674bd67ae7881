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
        table = Table(title="One prompt, one answer, every way of running the model")
        table.add_column("variant")
        for name in ("first token ms", "ms per token", "KV kB", "same as eager", "answer", "recall", "graphs"):
            table.add_column(name, justify="right")
        for result in self.generated.results:
            table.add_row(*self._row(result))
        return table

    def _row(self, result: Result) -> list[str]:
        tokens = self.generated.tokens.get(result.variant)
        if tokens is None or result.ttft_ms is None or result.tpot_ms is None:
            return [result.variant, result.reason or result.status] + [""] * 6
        total = self.generated.reference.shape[1]
        share = equal_share(tokens, self.generated.reference)
        right = is_right(self.tokenizer, tokens[0].tolist(), self.question.answer)
        scores = result.fidelity.recall or {}
        return [
            f"{result.variant}{' (declined)' if result.status == 'declined' else ''}",
            f"{result.ttft_ms.median:.1f}",
            f"{result.tpot_ms.median:.2f}",
            f"{(result.kv_bytes or 0) / 1e3:.0f}",
            f"first {result.fidelity.greedy_prefix}/{total}, {share:.0%}",
            "right" if right else "wrong",
            " ".join(f"{score:.2f}" for score in scores.values()) or "-",
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
