"""Recall questions: their length, their answers, and a model that knows them."""

from __future__ import annotations

import random

import pytest

from torchaccel.evaluation.models import LoadedModel, load_model
from torchaccel.evaluation.recall import TASKS, Task, is_right, make_question, recall_score


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_question_has_the_asked_length_and_tells_its_answer_once(demo: LoadedModel, task: Task) -> None:
    question = make_question(demo.tokenizer, task, 400, random.Random(3))
    text = demo.tokenizer.decode(question.tokens)
    assert len(question.tokens) == 400
    assert text.count(question.answer) == 1
    assert text.endswith(" is" if task.things else " is number")


def test_questions_are_reproducible(demo: LoadedModel) -> None:
    first, second = (make_question(demo.tokenizer, TASKS[1], 300, random.Random(1)) for _ in range(2))
    assert first == second


def test_too_short_a_prompt_is_an_error_that_says_how_long_it_must_be(demo: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"question of eight_facts needs .* tokens and 40 were allowed"):
        make_question(demo.tokenizer, TASKS[1], 40, random.Random(0))


def test_answers_match_exactly(demo: LoadedModel) -> None:
    tokens = demo.tokenizer.encode(" 1234. And", add_special_tokens=False)
    assert is_right(demo.tokenizer, tokens, "1234")
    assert not is_right(demo.tokenizer, tokens, "1235")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_demo_model_recalls(demo: LoadedModel, task: Task) -> None:
    assert recall_score(demo.model, demo.tokenizer, task, 512, 4) == 1.0
