"""Texts to evaluate on: files read, tokenised and cut into windows of equal length."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READERS: dict[str, Callable[[Path], bytes]] = {
    ".txt": Path.read_bytes,
    ".md": Path.read_bytes,
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}


def read_texts(path: Path) -> list[str]:
    """The text of a file (.txt, .md, or one of them with .xz or .gz), or of all such files below a folder, by name.

    Raises ``ValueError`` for a path that holds no text.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in READERS)
    if not files:
        raise ValueError(f"{path} is no text file and no folder with any ({', '.join(READERS)})")
    return [_read(file) for file in files]


def _read(file: Path) -> str:
    if file.suffix not in READERS:
        raise ValueError(f"{file} is not a text file; known are {', '.join(READERS)}")
    try:
        return READERS[file.suffix](file).decode("utf-8")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error


def cut_windows(texts: Sequence[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """Token ids ``[n, length]``, n at most ``count``: windows that do not overlap, evenly spread over all texts.

    No window spans two texts; each begins with the tokenizer's start token where it has one. Raises ``ValueError`` when
    no text is as long as a window.
    """
    start = start_tokens(tokenizer)
    step = length - len(start)
    found: list[list[int]] = []
    longest = 0
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        longest = max(longest, len(tokens))
        found += [start + tokens[at : at + step] for at in range(0, len(tokens) - step + 1, step)]
    if not found:
        raise ValueError(f"the longest text has {longest} tokens and a window {length}: give more text or shorten it")
    chosen = min(count, len(found))
    return torch.tensor([found[i * len(found) // chosen] for i in range(chosen)])


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: a list of its start token, or an empty list."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer.encode("a")[:1] == [start] else []


def byte_count(tokenizer: Any, tokens: Tensor) -> int:
    """Bytes of UTF-8 text that ``tokens`` ``[n, T]`` stand for."""
    return sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in tokens.tolist())
