"""Texts and windows, intervals, the ledger, and RULER's questions."""

from __future__ import annotations

import gzip
import lzma
import random
from math import log
from pathlib import Path

import pytest

from torchaccel.evaluation.intervals import paired_ratio
from torchaccel.evaluation.ledger import Ledger
from torchaccel.evaluation.models import DEMO_MODEL, load_tokenizer
from torchaccel.evaluation.tasks.ruler import RULER_TASKS, RulerTask, make_ruler_question
from torchaccel.evaluation.texts import byte_count, cut_windows, read_texts, start_tokens

TOKENIZER = load_tokenizer(DEMO_MODEL)


class WithStart:
    """A tokenizer that begins every text with token 7."""

    bos_token_id = 7

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [7] * add_special_tokens + [ord(c) for c in text]


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"first"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert read_texts(tmp_path) == ["first", "second", "third"]
    assert read_texts(tmp_path / "b.txt") == ["second"]


def test_what_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.txt.xz").write_bytes(b"no archive")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("broken.txt.xz", "latin.txt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as UTF-8 text"):
            read_texts(tmp_path / name)
    with pytest.raises(ValueError, match=r"no text file and no folder with any"):
        read_texts(tmp_path / "nothing")


def test_windows_do_not_overlap_and_are_spread_over_all_texts() -> None:
    text = " ".join(str(i) for i in range(400))
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    windows = cut_windows([text, text], TOKENIZER, 100, 6)
    assert windows.shape == (6, 100)
    starts = [next(at for at in range(len(tokens)) if tokens[at : at + 100] == row) for row in windows.tolist()]
    assert all(start % 100 == 0 for start in starts)
    assert len(set(starts[:3])) == 3 and starts[:3] == starts[3:]


def test_a_start_token_begins_every_window() -> None:
    windows = cut_windows(["abcdefgh"], WithStart(), 4, 10)
    assert windows.tolist() == [[7, 97, 98, 99], [7, 100, 101, 102]]
    assert start_tokens(TOKENIZER) == []


def test_bytes_are_those_of_the_text() -> None:
    windows = cut_windows(["Drei Männer. " * 50], TOKENIZER, 32, 2)
    assert byte_count(TOKENIZER, windows) == sum(len(TOKENIZER.decode(row).encode()) for row in windows.tolist())


def test_equal_pairs_have_ratio_one_and_no_width() -> None:
    assert paired_ratio([0.0, 0.0, 0.0]) == (1.0, [1.0, 1.0])


def test_the_interval_holds_the_ratio_and_narrows_with_more_pairs() -> None:
    rng = random.Random(0)
    noise = [log(1.1) + rng.gauss(0, 0.02) for _ in range(400)]
    few, many = paired_ratio(noise[:10]), paired_ratio(noise)
    for ratio, interval in (few, many):
        assert interval is not None and interval[0] < ratio < interval[1]
    assert few[1] is not None and many[1] is not None
    assert many[1][1] - many[1][0] < 0.5 * (few[1][1] - few[1][0])
    assert many[1][0] < 1.1 < many[1][1]
    assert paired_ratio([log(2.0)]) == (pytest.approx(2.0), None)


def test_the_ledger_remembers_across_processes(tmp_path: Path) -> None:
    path, calls = tmp_path / "ledger", []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"x": 1}

    assert Ledger(path, {"case": 1}).work({"piece": 1}, compute) == {"x": 1}
    assert Ledger(path, {"case": 1}).work({"piece": 1}, compute) == {"x": 1}
    assert len(calls) == 1
    Ledger(path, {"case": 2}).work({"piece": 1}, compute)
    Ledger(path, {"case": 1}).work({"piece": 2}, compute)
    assert len(calls) == 3, "another case and another piece are other work"


def test_a_line_cut_off_by_a_crash_costs_that_piece_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path, {})
    for piece in (1, 2):
        ledger.work({"piece": piece}, lambda: "done")
    path.write_text(path.read_text()[:-10])
    again = Ledger(path, {})
    assert again.work({"piece": 1}, lambda: "anew") == "done"
    assert again.work({"piece": 2}, lambda: "anew") == "anew"
    assert Ledger(path, {}).work({"piece": 2}, lambda: "third") == "anew"
    again.close()
    assert not path.exists()


@pytest.mark.parametrize("task", RULER_TASKS, ids=lambda task: task.name)
def test_a_ruler_question_holds_its_answers_at_the_asked_depth(task: RulerTask) -> None:
    early, late = (make_ruler_question(TOKENIZER, task, 512, random.Random(3), depth) for depth in (0.0, 1.0))
    assert len(early.tokens) == len(late.tokens) == 512
    text = TOKENIZER.decode(early.tokens)
    assert all(answer in text for answer in early.answers)
    assert len(early.answers) == task.answers
    assert early.score(TOKENIZER, TOKENIZER.encode(", ".join(early.answers))) == 1.0
    assert early.score(TOKENIZER, TOKENIZER.encode("none of them")) == 0.0
    if task.kind == "needles":
        first = early.answers[0]
        assert (
            text.index(first)
            < 80
            < len(TOKENIZER.decode(late.tokens)) - 700
            < TOKENIZER.decode(late.tokens).index(first)
        )


def test_a_chain_of_variables_is_told_in_order() -> None:
    question = make_ruler_question(TOKENIZER, RULER_TASKS[-1], 400, random.Random(5), 0.5)
    text = TOKENIZER.decode(question.tokens)
    places = [text.index(name) for name in question.answers]
    assert places == sorted(places)


def test_too_short_a_ruler_prompt_says_how_long_it_must_be() -> None:
    with pytest.raises(ValueError, match=r"question of niah_multivalue needs \d+ tokens and 30 were allowed"):
        make_ruler_question(TOKENIZER, RULER_TASKS[2], 30, random.Random(0), 0.5)
