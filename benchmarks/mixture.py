"""What the demo model is trained on: text, copying and recall, in shares that adapt to what it can do already."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from torchaccel.evaluation.recall import DIGITS, NAMES, THINGS, fact

Example = tuple[list[int], list[float]]

# Loss weights: the digits of an asked value are what a recall example is for; random tokens cannot be predicted.
ASKED, TOLD, QUESTION, REPEATED, RANDOM = 3.0, 0.3, 0.1, 1.5, 0.05
COPY_READY, RECALL_READY = 0.6, 0.8
FIRST_TOKEN = 2
SHORT = 256


@dataclass
class Mixture:
    """Draws training examples; ``copying`` and ``recall`` are the latest accuracies of the model on those tasks.

    Copying comes first, until induction heads have formed (they appear suddenly); then recall; then mostly text.
    """

    tokenizer: Tokenizer
    text: np.ndarray
    vocabulary: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    copying: float = 0.0
    recall: float = 0.0

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 ``[rows, length + 1]`` and the loss weight of each, float32."""
        drawn = [self._draw(length + 1) for _ in range(rows)]
        return torch.tensor([tokens for tokens, _ in drawn]), torch.tensor([weights for _, weights in drawn])

    def shares(self) -> tuple[float, float]:
        """Shares of copying and recall examples; the rest is text."""
        if self.copying < COPY_READY:
            return 0.6, 0.05
        return 0.12, 0.35 if self.recall < RECALL_READY else 0.15

    def copying_example(self, length: int) -> Example:
        """Segments of random tokens or text that come back word for word: what induction heads are made of."""
        tokens: list[int] = []
        weights: list[float] = []
        known: list[list[int]] = []
        while len(tokens) < length:
            if known and self.rng.random() < 0.6:
                segment = self.rng.choice(known)
                # The first tokens of a repetition tell which segment it is: they cannot be predicted.
                weights += [TOLD] * 2 + [REPEATED] * (len(segment) - 2)
            else:
                size = self.rng.randint(8, 60)
                noise = self.rng.random() < 0.6
                segment = self._noise(size) if noise else self._segment(size)
                known.append(segment)
                weights += [RANDOM] * size
            tokens += segment
        return tokens[:length], weights[:length]

    def recall_example(self, length: int) -> Example:
        """Facts with random values among text, then asked for again and again."""
        rng, long = self.rng, length > SHORT + 1
        tokens: list[int] = []
        weights: list[float] = []

        def add(text: str, weight: float) -> None:
            ids = self.tokenizer.encode(text).ids
            tokens.extend(ids)
            weights.extend([weight] * len(ids))

        things: tuple[str | None, ...] = (None,) if rng.random() < 0.6 else THINGS
        subjects = [(name, thing) for name in NAMES for thing in things]
        chosen = rng.sample(subjects, min(len(subjects), rng.randint(2, 40 if long else 10)))
        values = {who: "".join(rng.choices("0123456789", k=DIGITS)) for who in chosen}
        told = []
        for who in chosen:
            add(fact(*who), TOLD)
            add(f" {values[who]}", 0.0)
            add(".", TOLD)
            told.append(who)
            if rng.random() < (0.5 if long else 0.2):
                filler = self._segment(rng.randint(8, 80 if long else 24))
                tokens += filler
                weights += [1.0] * len(filler)
            if len(tokens) > length * 0.6:
                break
        while len(tokens) < length:
            who = rng.choice(told)
            add(fact(*who), QUESTION)
            add(" ", QUESTION)
            add(values[who], ASKED)
            add(".", TOLD)
        return tokens[:length], weights[:length]

    def _draw(self, length: int) -> Example:
        copying, recall = self.shares()
        kind = self.rng.random()
        if kind < copying:
            return self.copying_example(length)
        if kind < copying + recall:
            return self.recall_example(length)
        return self._segment(length), [1.0] * length

    def _segment(self, length: int) -> list[int]:
        if length > len(self.text):
            raise ValueError(f"the texts hold {len(self.text)} tokens and {length} are needed; give more text")
        start = self.rng.randint(0, len(self.text) - length)
        found: list[int] = self.text[start : start + length].tolist()
        return found

    def _noise(self, length: int) -> list[int]:
        return [self.rng.randrange(FIRST_TOKEN, self.vocabulary) for _ in range(length)]


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy of ``tokens`` ``[B, S+1]`` given ``logits`` ``[B, S, V]``, weighted per token."""
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    kept = weights[:, 1:].flatten()
    return (losses * kept).sum() / kept.sum()
