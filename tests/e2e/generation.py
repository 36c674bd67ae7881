"""What the end-to-end tests share: prompts, greedy generation, and a model compiled next to its eager twin."""

from __future__ import annotations

from typing import Any

import torch

import torchaccel
from tests.models.families import VOCAB, build


def prompt(batch: int, length: int, padding: tuple[int, ...] = (), seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids ``[batch, length]`` with ``padding[row]`` left-padded positions in each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count] = 0
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, torch.Tensor], tokens: int, **arguments: Any) -> torch.Tensor:
    """Ids that ``model.generate`` gives greedily, prompt included."""
    arguments = {"do_sample": False, "num_beams": 1, **arguments}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=tokens, **arguments)


def compiled(family: str, **arguments: Any) -> tuple[Any, Any]:
    """(eager model, the same model compiled by torchaccel); options go under ``options``.

    These models are so small that hardly a lossy method pays for them: it is applied all the same.
    """
    options = arguments.pop("options", {})
    if options.keys() & {"kv_compression", "sparse_attention"}:
        options = {"gate": False, **options}
    return build(family, **arguments), torchaccel.compile(build(family, **arguments), **options)


def phases(model: Any) -> list[str]:
    """Phases of the graphs compiled for a model, in order."""
    return [record.phase for record in torchaccel.report(model).records]


def all_lowered(model: Any) -> bool:
    """Whether every graph of a model was rewritten and nothing was declined."""
    found = torchaccel.report(model)
    return not found.declines and all(record.declined is None for record in found.records)
