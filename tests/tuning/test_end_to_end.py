"""The command line from a model to a bundle: interrupted, gone on with, used, moved to another file."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torchaccel.kernels import registry
from torchaccel.kernels.cpp import compile as toolchain
from typer.testing import CliRunner, Result

import torchaccel
from torchaccel.cli.app import app
from torchaccel.tuning.bundle import read_bundle
from torchaccel.tuning.cache import TuningCache


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiler: attention has two stock candidates, which take no time to build."""

    def absent(*_: object) -> str:
        raise InvalidCxxCompiler

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    with monkeypatch.context() as patch:
        patch.setattr(cpp_builder, "get_cpp_compiler", absent)
        forget()
        yield
    forget()


def forget() -> None:
    toolchain.missing_toolchain.cache_clear()
    for choose in (registry.linear, registry.fused, registry.append):
        choose.cache_clear()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tune(folder: Path, cache: Path, *more: object) -> Result:
    return run("tune", "--model", folder, "--shapes", "1x40,1x300", "--cache", cache, "--budget", "none", *more)


def test_from_a_model_to_a_bundle(model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = tmp_path / "tuning.sqlite", tmp_path / "other.sqlite"
    # Ctrl-C when the first result was written.
    add = TuningCache.add

    def add_and_interrupt(self: TuningCache, *records: Any) -> bool:
        stored = add(self, *records)
        os.kill(os.getpid(), signal.SIGINT)
        return stored

    with monkeypatch.context() as patch:
        patch.setattr(TuningCache, "add", add_and_interrupt)
        stopped = tune(folder, cache)
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.output
    assert len(TuningCache(cache).records()) == 1
    # The same command goes on; then there is nothing left.
    again = tune(folder, cache)
    assert again.exit_code == 0 and "3 measured, 0 failed, 1 known before, 0 left" in again.stdout
    assert "fastest" in again.stdout and str(cache) in again.stdout.replace("\n", "")
    tune(folder, cache, "--json", tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["measured"], found["known"], len(found["results"])) == (0, 4, 4)

    # A compilation finds everything it asks for, and says what it lacks.
    monkeypatch.setenv("TORCHACCEL_ASSERT_CACHE_HIT", "1")
    ids = torch.zeros(1, 20, dtype=torch.int64)
    with torch.no_grad():
        kept = model(ids).past_key_values
    options, mask = {"cache": str(cache)}, torch.ones(2, 21, dtype=torch.int64)
    report = torchaccel.explain(model, ids[:, :1], attention_mask=mask[:1], past_key_values=kept, options=options)
    assert [site.kernel for record in report.records for site in record.sites] == ["composed"]
    with pytest.raises(
        BackendCompilerFailed, match=r"CacheMissError(.|\n)*bucket\.B: asked 2, found 1\nRun torchaccel tune"
    ):
        pair = ids.expand(2, -1)[:, :1]
        torchaccel.explain(model, pair, attention_mask=mask, past_key_values=repeated(kept), options=options)
    monkeypatch.delenv("TORCHACCEL_ASSERT_CACHE_HIT")

    # Into a file, into another cache, into a bundle, and out of it.
    assert "4 results written" in run("cache", "export", tmp_path / "out.json", "--cache", cache).stdout
    assert "4 results read" in run("cache", "import", tmp_path / "out.json", "--cache", other).stdout
    assert set(TuningCache(other).records()) == set(TuningCache(cache).records())
    assert "4 valid results, 0 damaged" in run("cache", "verify", "--cache", other).stdout
    bundle = tmp_path / "model.bundle"
    made = run("bundle", "create", bundle, "--model", folder, "--no-code", "--cache", cache)
    assert made.exit_code == 0 and set(read_bundle(bundle).tuned) == set(TuningCache(cache).records())
    assert "4 tuned results" in run("bundle", "verify", bundle).stdout
    third = tmp_path / "third.sqlite"
    loaded = run("bundle", "load", bundle, "--cache", third)
    assert loaded.exit_code == 0 and set(TuningCache(third).records()) == set(TuningCache(cache).records())
    assert "4 results removed" in run("cache", "prune", "--older-than", 0, "--cache", third).stdout


def repeated(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    return cache


def test_a_budget_that_is_spent_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    answer = run("tune", "--model", folder, "--shapes", "1x40", "--cache", tmp_path / "t.sqlite", "--budget", "0s")
    assert answer.exit_code == 0 and "2 left" in answer.stdout and "the same command goes on" in answer.stdout
