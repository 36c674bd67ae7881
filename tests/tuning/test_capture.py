"""From a model to what is tuned, and from the options of a compilation to what is brought along."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torchaccel.kernels.fused_spec import FusedSpec
from torchaccel.kernels.spec import AttentionSpec, LinearSpec

import torchaccel
from tests.tuning.support import MACHINE, timing
from torchaccel.backend import Backend
from torchaccel.capture import capture_tasks
from torchaccel.errors import CacheWarning, TuningError
from torchaccel.reporting import Journal
from torchaccel.tuning.bundle import Bundle
from torchaccel.tuning.cache import TuningCache
from torchaccel.tuning.tuner import Task


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=4096,
    )
    return transformers.LlamaForCausalLM(config).eval()


def attention(tasks: list[Task], phase: str) -> list[Task]:
    return [task for task in tasks if isinstance(task.spec, AttentionSpec) and task.spec.phase == phase]


def test_a_language_model_needs_its_prompts_and_its_steps_kernels(model: Any) -> None:
    # Without fusion, every linear layer is a kernel of its own.
    tasks = capture_tasks(model, torch.zeros(2, 2048, dtype=torch.int64), {"fusion": False})
    (decode,) = attention(tasks, "decode")
    assert dict(decode.shape) == {"B": 2, "H_kv": 2, "Q": 1, "S": 2048}
    assert isinstance(decode.spec, AttentionSpec) and (decode.spec.head_dim, decode.spec.group) == (16, 2)
    assert all(dict(task.shape) == {"B": 2, "H_kv": 2, "S": 2048} for task in attention(tasks, "prefill"))
    linear = [task for task in tasks if isinstance(task.spec, LinearSpec)]
    # Queries, keys and values together; output; gate and up together; down; logits.
    widths = {(task.shape["M"], task.shape["K"], task.shape["N"]) for task in linear}
    assert widths == {(2, 64, 128), (2, 64, 64), (2, 64, 192), (2, 96, 64), (2, 64, 128)}


def test_the_options_decide_which_kernels(model: Any) -> None:
    tasks = capture_tasks(model, torch.zeros(1, 300, dtype=torch.int64), {"kv_compression": "int8"})
    # The exact kernel, too: the gate compares both.
    kinds = {task.spec.key_format.kind for task in attention(tasks, "decode") if isinstance(task.spec, AttentionSpec)}
    assert kinds == {"int8", "dense"}


def test_fused_programs_are_tasks_of_their_own(model: Any) -> None:
    tasks = capture_tasks(model, torch.zeros(2, 64, dtype=torch.int64), None)
    fused = [task for task in tasks if isinstance(task.spec, FusedSpec)]
    # The first projections, what stands between two attentions, and what ends the model.
    assert len(fused) == 3 and all(dict(task.shape) == {"M": 2} for task in fused)
    # The mask of an attention, the rows of a layer: nothing is listed twice.
    assert len(tasks) == len({(task.spec, tuple(task.shape.items())) for task in tasks})


def test_rows_of_one_prompt_need_a_kernel_for_it_and_one_for_their_own_tokens(model: Any) -> None:
    inputs = torch.zeros(6, 300, dtype=torch.int64)
    plain = capture_tasks(model, inputs, None)
    more = [task for task in capture_tasks(model, inputs, None, shared_prompt=True) if task not in plain]
    assert [dict(task.shape) for task in more] == [
        {"B": 1, "H_kv": 2, "S": 300, "Q": 6},
        {"B": 6, "H_kv": 2, "S": 300, "Q": 1},
    ]
    prefix, own = (task.spec for task in more)
    assert isinstance(prefix, AttentionSpec) and isinstance(own, AttentionSpec)
    assert prefix.lse and prefix == own
    alone = torch.zeros(1, 300, dtype=torch.int64)
    assert capture_tasks(model, alone, None, shared_prompt=True) == capture_tasks(model, alone, None)


def test_a_language_model_is_traced_as_generate_calls_it(model: Any) -> None:
    tasks = capture_tasks(model, torch.zeros(2, 64, dtype=torch.int64), {"fusion": False})
    (decode,) = attention(tasks, "decode")
    assert isinstance(decode.spec, AttentionSpec) and decode.spec.mask == "bool"


def test_many_sizes_are_captured_one_after_another(model: Any) -> None:
    # Dynamo would run the fifth eagerly, and trace the second batch size as any size.
    sizes = [(1, 40), (2, 40), (3, 50), (4, 60), (5, 70)]
    for batch, tokens in sizes:
        tasks = capture_tasks(model, torch.zeros(batch, tokens, dtype=torch.int64), {"fusion": False})
        (decode,) = attention(tasks, "decode")
        assert dict(decode.shape) == {"B": batch, "H_kv": 2, "Q": 1, "S": tokens}


def test_a_mask_is_given_as_the_model_takes_it(model: Any) -> None:
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, :5] = 0
    inputs = {"input_ids": torch.zeros(2, 64, dtype=torch.int64), "attention_mask": mask}
    (decode,) = attention(capture_tasks(model, inputs, None), "decode")
    assert isinstance(decode.spec, AttentionSpec) and decode.spec.mask == "bool"


def test_inputs_without_tokens_are_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="found nothing"):
        capture_tasks(model, {}, None)


def test_a_model_without_kernels_says_so() -> None:
    with pytest.raises(TuningError, match="no kernel"):
        torchaccel.tune(nn.Sequential(nn.ReLU()), {"input": torch.zeros(2, 3)})


def test_tuning_a_model_fills_the_cache_it_was_given(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    path = tmp_path / "tuning.sqlite"
    inputs = torch.zeros(1, 64, dtype=torch.int64)
    # The budget is spent after the first candidate.
    summary = torchaccel.tune(model, inputs, options={"cache": str(path)}, budget=1e-3)
    assert summary.measured + summary.failed <= 1 and summary.left > 0
    assert len(TuningCache(path).records()) == summary.measured + summary.failed


def test_a_compilation_brings_its_bundle_once_and_says_what_was_refused(tmp_path: Path) -> None:
    bundle = Bundle(MACHINE, {}, (timing(),), {}, {}, b"artifacts")
    bundle.write(tmp_path / "model.bundle")
    replace(bundle, artifacts=None).write(tmp_path / "portable.bundle")
    backend = Backend(Journal(), execute_only=True)

    def compiled(path: Path) -> Any:
        torch._dynamo.reset()
        options = {"bundle": str(path), "trust": True}
        return torch.compile(nn.Linear(4, 4).eval(), backend=lambda gm, x: backend(gm, x, options=options))

    x = torch.ones(1, 4)
    with torch.no_grad():
        with pytest.warns(CacheWarning, match="another device"):
            compiled(tmp_path / "model.bundle")(x)
        compiled(tmp_path / "portable.bundle")(x)
        with pytest.warns(CacheWarning, match="cannot be read"):
            compiled(tmp_path / "absent.bundle")(x)
