"""The training script of the demo model: its texts, its mixture, and a run of seconds that resumes."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import list_texts, prepare, read_text, split_by_author
from mixture import ASKED, FIRST_TOKEN, Mixture, weighted_loss
from tokenizers import Tokenizer
from train_demo_model import main

from torchaccel.evaluation.models import load_model
from torchaccel.evaluation.prompts import excerpt

NOVELS = Path(__file__).parents[3] / "shared" / "data" / "novels"
VOCABULARY = 400


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    half = len(excerpt()) // 2
    (folder / "First_Author.txt").write_text(excerpt()[:half])
    (folder / "Second_Author.txt.xz").write_bytes(lzma.compress(excerpt()[half:].encode()))
    return folder


@pytest.fixture(scope="module")
def mixture(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    tokenizer, train, _ = prepare(texts, tmp_path_factory.mktemp("out"), VOCABULARY)
    return Mixture(tokenizer, train, VOCABULARY, random.Random(1))


def test_texts_are_split_by_author(texts: Path) -> None:
    train, held_out = split_by_author(list_texts(texts))
    assert len(train) == len(held_out) == 1
    assert not set(train) & set(held_out)


def test_lines_are_joined_and_paragraphs_kept(tmp_path: Path) -> None:
    path = tmp_path / "A_b.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\nthree\n".encode())
    assert read_text(path) == "one two\n\nthree "


def test_a_folder_without_texts_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        list_texts(tmp_path)


@pytest.mark.skipif(not NOVELS.is_dir(), reason="the novels are not part of the repository")
def test_novels_are_read() -> None:
    paths = list_texts(NOVELS)
    train, held_out = split_by_author(paths)
    assert len(train) + len(held_out) == len(paths)
    assert len(read_text(held_out[0])) > 100_000


@pytest.mark.parametrize("length", [200, 400])
def test_asked_digits_weigh_most_and_were_told(mixture: Mixture, length: int) -> None:
    tokens, weights = mixture.recall_example(length)
    assert len(tokens) == len(weights) == length
    asked = [token for token, weight in zip(tokens, weights, strict=True) if weight == ASKED]
    assert asked
    assert all(text.isdigit() for text in map(mixture.tokenizer.decode, ([token] for token in asked)))


def test_repeated_segments_weigh_more_than_random_ones(mixture: Mixture) -> None:
    tokens, weights = mixture.copying_example(600)
    assert len(tokens) == len(weights) == 600
    assert min(tokens) >= 0 and max(tokens) < VOCABULARY
    assert max(weights) > 1 > min(weights)


def test_the_mixture_moves_on_once_copying_and_recall_work(mixture: Mixture) -> None:
    stages = [
        Mixture(mixture.tokenizer, mixture.text, VOCABULARY, copying=c, recall=r) for c, r in ((0, 0), (1, 0), (1, 1))
    ]
    copying, recall = zip(*(stage.shares() for stage in stages), strict=True)
    assert copying[0] > copying[1] == copying[2]
    assert recall[1] > recall[2] > recall[0]


def test_the_loss_ignores_what_weighs_nothing() -> None:
    logits = torch.zeros(1, 3, 10)
    logits[0, 0, 7] = 50.0
    tokens, weights = torch.tensor([[1, 7, 2, 3]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert weighted_loss(logits, tokens, weights).item() == pytest.approx(0.0, abs=1e-6)


def test_too_little_text_is_an_error(mixture: Mixture) -> None:
    small = Mixture(mixture.tokenizer, np.zeros(10, np.uint16), VOCABULARY, copying=1.0, recall=1.0)
    with pytest.raises(ValueError, match="hold 10 tokens"):
        for _ in range(50):
            small.batch(1, 64)


def test_a_run_resumes_and_saves_a_model_that_loads(texts: Path, tmp_path: Path) -> None:
    def train(seconds: float) -> dict[str, float]:
        main(
            texts, tmp_path, seconds / 60, hidden=32, intermediate=None, layers=1, heads=2, kv_heads=1,
            vocabulary=VOCABULARY, context=512, tokens_per_step=256, device="cpu", compiled=False,
        )  # fmt: skip
        found: dict[str, float] = json.loads((tmp_path / "state.json").read_text())
        return found

    first, second = train(0.5), train(1.0)
    assert second["step"] > first["step"] > 0
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.model.config.vocab_size == VOCABULARY
    assert loaded.tokenizer is not None
    assert "one_fact@256" in json.loads((tmp_path / "model" / "scores.json").read_text())
    assert isinstance(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer)
    assert FIRST_TOKEN == 2
