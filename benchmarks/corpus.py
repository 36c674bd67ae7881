"""Texts for training the demo model: read, clean, split by author, tokenise."""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END, PAD = "<|end|>", "<|pad|>"
SPECIAL = [END, PAD]
# A tokenizer needs a sample, not the whole library: the first part of every text.
SAMPLE_CHARACTERS = 300_000


def list_texts(folder: Path) -> list[Path]:
    """All .txt and .txt.xz files of ``folder``, sorted; raises ``FileNotFoundError`` when there is none."""
    found = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.xz")])
    if not found:
        raise FileNotFoundError(f"{folder} holds no .txt or .txt.xz files; give a folder with at least two texts")
    return found


def split_by_author(paths: list[Path], share: float = 1 / 6) -> tuple[list[Path], list[Path]]:
    """Training and held-out texts: every text of some authors (the name up to the first "_") is held out.

    A single author's texts are split by text instead, and a single text is used for both.
    """
    if len(paths) == 1:
        return paths, paths
    authors = sorted({path.name.split("_")[0] for path in paths})
    if len(authors) == 1:
        return paths[:-1], paths[-1:]
    held = set(random.Random(0).sample(authors, max(1, int(len(authors) * share))))
    train = [path for path in paths if path.name.split("_")[0] not in held]
    return train, [path for path in paths if path not in train]


def read_text(path: Path) -> str:
    """A text with its lines joined into paragraphs."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    text = raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with digits one by one, so that a number is recalled digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((text[:SAMPLE_CHARACTERS] for text in texts), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, paths: list[Path]) -> np.ndarray:
    """All tokens of some texts, each ended by the end token, as one uint16 array."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([np.array([*tokenizer.encode(read_text(path)).ids, end], np.uint16) for path in paths])


def prepare(folder: Path, out: Path, vocabulary: int) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, training tokens and held-out tokens of ``folder``; made once and kept in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "tokenizer.json", out / "train.npy", out / "held_out.npy"
    if not all(path.is_file() for path in kept):
        train, held_out = split_by_author(list_texts(folder))
        tokenizer = train_tokenizer(map(read_text, train), vocabulary)
        np.save(kept[1], encode(tokenizer, train))
        np.save(kept[2], encode(tokenizer, held_out))
        tokenizer.save(str(kept[0]))
    return Tokenizer.from_file(str(kept[0])), np.load(kept[1], mmap_mode="r"), np.load(kept[2], mmap_mode="r")
