"""Named models, folders, and copies that share their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
)

from torchaccel.evaluation.bench import Setup, open_session
from torchaccel.evaluation.case import Case
from torchaccel.evaluation.models import is_encoder, load_model, model_facts, require_transformers, share_weights

from .tiny import save_tiny_model, tiny_model


def test_the_demo_model_comes_with_the_package() -> None:
    loaded = load_model("demo")
    facts = model_facts(loaded)
    assert (facts.params, facts.dtype, facts.layers) == (3_542_208, "bfloat16", 8)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(" Alice is number 1234.")) == " Alice is number 1234."
    assert loaded.tokenizer.eos_token_id == loaded.model.config.eos_token_id == 0


def test_a_folder_is_loaded_in_the_asked_dtype(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path)), dtype=torch.bfloat16)
    assert model_facts(loaded).dtype == "bfloat16"
    assert loaded.tokenizer is not None
    assert not loaded.model.training


def test_an_unknown_name_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"none of demo, llama-110m and minilm.*config\.json"):
        load_model("no-such-model")


def save_tiny_bert(folder: Path, kind: type[BertPreTrainedModel]) -> Path:
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    kind(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(BertModel, BertModel), (BertForMaskedLM, BertModel), (BertForSequenceClassification,) * 2],
    ids=["embeddings", "masked", "classifier"],
)
def test_encoders_are_loaded_as_what_they_are(tmp_path: Path, saved: type, loaded: type) -> None:
    model = load_model(str(save_tiny_bert(tmp_path, saved))).model
    assert type(model) is loaded
    assert is_encoder(model)
    assert not is_encoder(tiny_model())


def test_bench_sends_encoders_to_evaluate(tmp_path: Path) -> None:
    setup = Setup(str(save_tiny_bert(tmp_path, BertModel)), "cpu", probe_megabytes=8, probe_gemm=128)
    with pytest.raises(ValueError, match=r"is an encoder and generates nothing to time; use torchaccel evaluate"):
        open_session(Case("decode", 8), setup)


def test_copies_share_parameters_and_nothing_else() -> None:
    model = tiny_model()
    copy = share_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert copy.model.layers[0] is not model.model.layers[0]
    copy.compile(backend="eager")
    assert model._compiled_call_impl is None


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"torchaccel\[transformers\]"):
        require_transformers()
