"""What the evaluator is for: methods that are wrong must be visible in its numbers, and the exact model must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchaccel.evaluation.models import LoadedModel, load_model, share_weights
from torchaccel.evaluation.prompts import excerpt
from torchaccel.evaluation.recall import TASKS
from torchaccel.evaluation.results import Fidelity
from torchaccel.evaluation.tasks.likelihood import reference_logits, score, summarise
from torchaccel.evaluation.tasks.retrieval import retrieval_score
from torchaccel.evaluation.texts import cut_windows

PROMPT, WINDOW = 96, 192


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", dtype=torch.float32)


@pytest.fixture(scope="module")
def windows(demo: LoadedModel) -> Tensor:
    return cut_windows([excerpt()], demo.tokenizer, WINDOW, 4)


def fidelity(demo: LoadedModel, model: Any, windows: Tensor) -> Fidelity:
    reference = reference_logits(demo.model, windows, PROMPT)
    return summarise([score(model, windows, PROMPT, reference).to_dict(len(windows))], 3.0, PROMPT)[0]


def wrong_scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.5


def stuck_positions(model: Any) -> None:
    def stop(_module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = given["position_ids"]
        return args, given | {"position_ids": positions.clamp(max=PROMPT)}

    model.model.rotary_emb.register_forward_pre_hook(stop, with_kwargs=True)


def random_eviction(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def forget(_module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch, new = given["input_ids"].shape
        if new == 1:
            columns = given["past_key_values"].get_seq_length() + 1
            kept = torch.rand(batch, columns, generator=generator) > 0.5
            kept[:, -1] = True
            given = given | {"attention_mask": kept.long()}
        return args, given

    model.register_forward_pre_hook(forget, with_kwargs=True)


def test_the_same_model_differs_by_rounding_only(demo: LoadedModel, windows: Tensor) -> None:
    found = fidelity(demo, share_weights(demo.model), windows)
    assert found.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert found.kl is not None and found.kl < 1e-6
    assert found.top1 == 1.0
    assert found.max_abs_err_vs_fp32 is not None and found.max_abs_err_vs_fp32 < 1e-3
    assert found.bits_per_byte is not None and 1.0 < found.bits_per_byte < 3.0


@pytest.mark.parametrize("broken", [wrong_scale, stuck_positions, random_eviction], ids=lambda f: f.__name__)
def test_a_broken_method_is_visible(demo: LoadedModel, windows: Tensor, broken: Callable[[Any], None]) -> None:
    model = share_weights(demo.model)
    broken(model)
    found = fidelity(demo, model, windows)
    assert found.perplexity_ratio is not None and found.perplexity_ratio_ci95 is not None
    assert found.perplexity_ratio_ci95[0] > 1.0, "the loss must be beyond chance"
    assert found.kl is not None and found.kl > 1e-3
    assert found.top1 is not None and found.top1 < 0.99


def test_forgetting_costs_recall(demo: LoadedModel) -> None:
    forgetful = share_weights(demo.model)
    random_eviction(forgetful)
    good, bad = (retrieval_score(m, demo.tokenizer, TASKS[1], 256, 0.25, 4) for m in (demo.model, forgetful))
    assert good == 1.0
    assert bad < 0.75
