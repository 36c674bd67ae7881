"""Key recall: facts hidden in real text, one asked for at the end, scored by exact match of its four digits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from .prompts import excerpt_tokens

# fmt: off
NAMES = (
    "Alice", "Bertram", "Clara", "David", "Edith", "Frank", "Grace", "Harold", "Irene", "Jasper", "Kate", "Lionel",
    "Martha", "Ned", "Olive", "Philip", "Rachel", "Simon", "Tess", "Walter", "Agnes", "Basil", "Cecil", "Dora",
    "Emma", "Felix", "George", "Helen", "Isaac", "Jane",
)
# fmt: on
THINGS = ("key", "code", "number", "price", "age", "room", "page", "ticket")
DIGITS = 4
# The demo model's tokenizer spells an answer as a space and one token per digit.
ANSWER_TOKENS = DIGITS + 1


@dataclass(frozen=True)
class Task:
    """``facts`` facts in one prompt; with ``things`` every name owns things that have numbers, else a number itself."""

    name: str
    facts: int
    things: bool = False


TASKS = (Task("one_fact", 1), Task("eight_facts", 8), Task("eight_things", 8, things=True))


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt that ends just before the answer, and the four digits that answer it."""

    tokens: list[int]
    answer: str
    new_tokens: int = ANSWER_TOKENS

    def score(self, tokenizer: Any, tokens: list[int]) -> float:
        """1 when ``tokens`` begin with the answer, else 0."""
        return float(is_right(tokenizer, tokens, self.answer))


def fact(name: str, thing: str | None) -> str:
    """How a fact is told up to its value, with the leading space the tokenizer expects."""
    return f" {name} is number" if thing is None else f" The {thing} of {name} is"


def make_question(tokenizer: Any, task: Task, length: int, rng: random.Random, depth: float | None = None) -> Question:
    """A prompt of ``length`` tokens: the excerpt with the facts at random places, then one fact up to its value.

    depth: where the fact that is asked for stands, from 0 (the beginning) to 1 (the end of the text); anywhere for
    None. Raises ``ValueError`` when ``length`` leaves no room for the facts.
    """
    subjects = rng.sample(_subjects(task), task.facts)
    values = ["".join(rng.choices("0123456789", k=DIGITS)) for _ in subjects]
    told = [_encode(tokenizer, f"{fact(*who)} {value}.") for who, value in zip(subjects, values, strict=True)]
    asked = rng.randrange(task.facts)
    question = _encode(tokenizer, fact(*subjects[asked]))
    room = length - sum(map(len, told)) - len(question)
    if room < 0:
        raise ValueError(
            f"a question of {task.name} needs {length - room} tokens and {length} were allowed; use a longer context"
        )
    places = [rng.randint(0, room) for _ in told]
    if depth is not None:
        places[asked] = round(depth * room)
    return Question(insert(excerpt_tokens(tokenizer, room), told, places) + question, values[asked])


def insert(text: list[int], pieces: list[list[int]], places: list[int]) -> list[int]:
    """``text`` with every piece of tokens put before the token at its place."""
    tokens: list[int] = []
    done = 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        tokens += text[done:place] + piece
        done = place
    return tokens + text[done:]


def recall_score(model: Any, tokenizer: Any, task: Task, length: int, questions: int) -> float:
    """Share of ``questions`` seeded questions of ``length`` tokens that ``model.generate`` answers exactly."""
    rng = random.Random(f"{task.name}/{length}")
    device = next(model.parameters()).device
    right = 0
    for _ in range(questions):
        question = make_question(tokenizer, task, length, rng)
        prompt = torch.tensor([question.tokens], device=device)
        right += is_right(tokenizer, answer_tokens(model, prompt), question.answer)
    return right / questions


def answer_tokens(model: Any, prompt: torch.Tensor) -> list[int]:
    """The tokens ``model.generate`` puts after ``prompt`` ``[1, S]``: as many as an answer has."""
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    return generated[0, prompt.shape[1] :].tolist()


def is_right(tokenizer: Any, tokens: list[int], answer: str) -> bool:
    """Whether ``tokens`` begin with the four digits of ``answer``."""
    return tokenizer.decode(tokens[:ANSWER_TOKENS]).strip() == answer


def _subjects(task: Task) -> list[tuple[str, str | None]]:
    return [(name, thing) for name in NAMES for thing in (THINGS if task.things else (None,))]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
