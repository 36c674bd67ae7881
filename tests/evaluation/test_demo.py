"""The demonstration's question, table and document, with eager alone (the whole of it takes minutes)."""

from __future__ import annotations

from rich.console import Console

from torchaccel.evaluation.bench import Setup
from torchaccel.evaluation.demo import LOSSY, answer_text, demo_variants, run_demo
from torchaccel.evaluation.runners import parse_baselines
from torchaccel.evaluation.session import Case
from torchaccel.methods import FAMILIES

from .schema import check_document


def test_the_demo_shows_every_family_alone_and_all_together() -> None:
    variants = demo_variants()
    assert set(LOSSY) == set(FAMILIES)
    assert [v.kind for v in variants[:3]] == ["eager", "inductor", "torchaccel"]
    assert [set(v.options) for v in variants[2:]] == [set(), *({family} for family in LOSSY), set(LOSSY)]


def test_eager_answers_the_question() -> None:
    case = Case("generate", context=256, new_tokens=8, rounds=1, warmup=0, recall_questions=2)
    setup = Setup("demo", "cpu", "float32", cold=False, probe_megabytes=8, probe_gemm=128)
    demo = run_demo(case, setup, ["torchaccel", "demo"], variants=parse_baselines("eager"))
    check_document(demo.document)
    assert answer_text(demo).strip() == demo.question.answer
    console = Console(width=160)
    with console.capture() as shown:
        console.print(demo.table())
    row = next(line for line in shown.get().splitlines() if line.split()[:1] == ["eager"])
    assert row.split()[4:8] == ["8/8", "100%", "right", "100%"]
