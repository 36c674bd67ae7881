"""The commands that measure again: exact, quoted for a shell, and one per variant."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from torchaccel.evaluation.html.commands import commands
from torchaccel.evaluation.html.documents import parse

from . import samples

INT8 = {"kv_compression": "int8"}


def lines(command: list[str]) -> dict[str, list[str]]:
    results = [
        samples.result("eager"),
        samples.result("torchaccel:exact"),
        samples.result("torchaccel:int8", options=INT8),
    ]
    (document,) = parse([samples.document("decode", results, command=command)])
    return {each.what: shlex.split(each.line) for each in commands(document)}


def test_the_whole_command_comes_back_from_a_shell_as_it_was() -> None:
    command = ["torchaccel", "bench", "decode", "--model", "a b", "--options", '{"x": "it\'s"}', "--json", "$HOME/d"]
    assert lines(command)["the whole document"] == command


@pytest.mark.parametrize("chosen", [["--options", "{}", "--baselines", "eager"], ["--baselines=eager", "--options={}"]])
def test_a_variant_alone_keeps_the_case_and_writes_no_file(chosen: list[str]) -> None:
    common = ["torchaccel", "bench", "decode", "--context", "512", "--warm"]
    found = lines([*common, *chosen, "--json", "doc.json", "--html=page.html"])
    assert found["eager"] == [*common, "--baselines", "eager"]
    assert found["torchaccel:exact"] == [*common, "--baselines", ""]
    assert found["torchaccel:int8"] == [*common, "--baselines", "", "--options", '{"kv_compression": "int8"}']


def test_evaluate_chooses_by_options_alone() -> None:
    found = lines(["torchaccel", "evaluate", "--model", "demo", "--options", "{}", "--journal", "x.partial"])
    common = ["torchaccel", "evaluate", "--model", "demo"]
    assert found["eager"] == common
    assert found["torchaccel:exact"] == [*common, "--options", "{}"]
    assert found["torchaccel:int8"] == [*common, "--options", '{"kv_compression": "int8"}']


@pytest.mark.parametrize("command", [["torchaccel", "demo"], ["torchaccel.evaluate"]])
def test_commands_without_a_choice_of_variants_are_shown_whole(command: list[str]) -> None:
    assert lines(command) == {"the whole document": command}


@pytest.mark.parametrize("command", [[], None, "torchaccel bench"])
def test_no_command_no_line(command: Any) -> None:
    assert lines(command) == {}
