"""Retrieval tasks in the manner of RULER (2024): needles, several keys, values and queries, chains of variables.

The sentences are plain English for models that follow them; what a model answers is searched for the expected strings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..prompts import excerpt_tokens
from ..recall import insert

# fmt: off
KEYS = (
    "amber", "basalt", "cobalt", "dolphin", "ember", "falcon", "garnet", "harbor", "indigo", "jasmine", "kestrel",
    "lantern", "maple", "nectar", "orchid", "pepper", "quartz", "raven", "saffron", "thistle", "umber", "velvet",
    "walnut", "zephyr",
)
# fmt: on
DIGITS = 5
HOPS = 4
NEEDLES = 4


@dataclass(frozen=True)
class RulerTask:
    """``keys`` needles with ``values`` numbers each, ``asked`` of the keys asked for; or a chain of variables."""

    name: str
    keys: int = 1
    values: int = 1
    asked: int = 1
    kind: Literal["needles", "variables"] = "needles"

    @property
    def answers(self) -> int:
        """Strings that a right answer contains."""
        return HOPS + 1 if self.kind == "variables" else self.asked * self.values


RULER_TASKS = (
    RulerTask("niah_single"),
    RulerTask("niah_multikey", keys=NEEDLES),
    RulerTask("niah_multivalue", values=NEEDLES),
    RulerTask("niah_multiquery", keys=NEEDLES, asked=NEEDLES),
    RulerTask("variable_tracking", kind="variables"),
)


@dataclass(frozen=True)
class RulerQuestion:
    """Token ids of a prompt, the strings a right answer contains, and the tokens to generate for it."""

    tokens: list[int]
    answers: list[str]
    new_tokens: int

    def score(self, tokenizer: Any, tokens: list[int]) -> float:
        """Share of the expected strings that the text of ``tokens`` contains."""
        text = tokenizer.decode(tokens)
        return sum(answer in text for answer in self.answers) / len(self.answers)


def make_ruler_question(
    tokenizer: Any, task: RulerTask, length: int, rng: random.Random, depth: float
) -> RulerQuestion:
    """A prompt of ``length`` tokens whose first asked-for needle stands at ``depth`` (0 beginning, 1 end of the text).

    Raises ``ValueError`` when ``length`` leaves no room for the needles.
    """
    told, question, answers = (_variables if task.kind == "variables" else _needles)(task, rng)
    needles = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in told]
    end = tokenizer.encode(question, add_special_tokens=False)
    room = length - sum(map(len, needles)) - len(end)
    if room < 0:
        raise ValueError(
            f"a question of {task.name} needs {length - room} tokens and {length} were allowed; use a longer context"
        )
    places = [rng.randint(0, room) for _ in needles]
    places[0] = round(depth * room)
    if task.kind == "variables":  # a variable is assigned before it is read
        places = sorted(places)
    new_tokens = 8 + sum(len(tokenizer.encode(f" {answer},", add_special_tokens=False)) for answer in answers)
    return RulerQuestion(insert(excerpt_tokens(tokenizer, room), needles, places) + end, answers, new_tokens)


def _needles(task: RulerTask, rng: random.Random) -> tuple[list[str], str, list[str]]:
    keys = rng.sample(KEYS, task.keys)
    numbers = {key: [_digits(rng) for _ in range(task.values)] for key in keys}
    told = [f" Remember this: the secret number of {key} is {number}." for key in keys for number in numbers[key]]
    asked = keys[: task.asked]
    names = " and of ".join(asked)
    numbered, verb = ("numbers", "are") if task.answers > 1 else ("number", "is")
    question = (
        f"\n\nWhich secret {numbered} of {names} {verb} given above?\nAnswer: the secret {numbered} of {names} {verb}"
    )
    return told, question, [number for key in asked for number in numbers[key]]


def _variables(task: RulerTask, rng: random.Random) -> tuple[list[str], str, list[str]]:
    names = ["".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=4)) for _ in range(HOPS + 1)]
    value = _digits(rng)
    told = [f" Let variable {names[0]} be {value}."]
    told += [f" Let variable {name} equal variable {before}." for before, name in pairwise(names)]
    question = (
        f"\n\nWhich variables have the value {value}, directly or through others? There are {len(names)} of them."
        "\nAnswer: the variables are"
    )
    return told, question, names


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=DIGITS))
