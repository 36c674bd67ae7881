"""What methods share that treat the tokens of images unlike those of text."""

from __future__ import annotations

import torch
from torch import Tensor

from torchaccel.runtime.eviction import Prompt

from .evicting import EvictingOptions

# Ids, and first and last ones of ranges.
ImageTokens = tuple[int | tuple[int, int], ...]


class ModalityOptions(EvictingOptions):
    """image_tokens: the id of the tokens that stand for images, or several, or (first, last) of ranges of them. None:
    those in whose place the model puts other features."""

    image_tokens: int | ImageTokens | None = None

    @property
    def image_ids(self) -> ImageTokens:
        """``image_tokens`` as a tuple, empty for None."""
        given = self.image_tokens
        return () if given is None else (given,) if isinstance(given, int) else given


def images(prompt: Prompt, image_ids: ImageTokens) -> Tensor:
    """Which tokens of a prompt are of images, bool ``[B, S]``: by their ids, else as the graph told."""
    if not image_ids:
        assert prompt.images is not None
        return prompt.images
    assert prompt.ids is not None
    found = torch.zeros_like(prompt.ids, dtype=torch.bool)
    for entry in image_ids:
        first, last = (entry, entry) if isinstance(entry, int) else entry
        found |= (prompt.ids >= first) & (prompt.ids <= last)
    return found
