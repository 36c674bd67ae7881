"""Encoders: how close a variant's sentence embeddings or class logits are to the float32 model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arms import Arm
from .run import Run

BATCH = 8
MAX_TOKENS = 256
PARAGRAPHS = 40


def similarity(model: Any, truth: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Cosine similarity of ``model``'s answer to each text with that of the float32 model ``truth``.

    An answer is the logits of a classifier, else the mean of the last hidden states over the real tokens. ``top1``: the
    share of texts put into the same class, None for embeddings.
    """
    ours, wanted = (torch.cat(list(_answers(each, tokenizer, texts))) for each in (model, truth))
    cosine = F.cosine_similarity(ours.double(), wanted.double(), dim=-1)
    classes = _is_classifier(truth)
    return {
        "kind": "logits" if classes else "embedding",
        "mean": cosine.mean().item(),
        "min": cosine.min().item(),
        "texts": len(texts),
        "top1": (ours.argmax(-1) == wanted.argmax(-1)).double().mean().item() if classes else None,
        "max_abs_err": (ours - wanted).abs().max().item(),
    }


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    device = next(model.parameters()).device
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        out = model(**batch)
        yield out.logits.float() if _is_classifier(model) else _mean_pool(out.last_hidden_state, batch.attention_mask)


def _mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean ``[B, C]`` of states ``[B, S, C]`` over the tokens that ``mask`` ``[B, S]`` counts."""
    weight = mask[..., None].float()
    return (states.float() * weight).sum(1) / weight.sum(1)


def _is_classifier(model: Any) -> bool:
    return any("ForSequenceClassification" in name for name in model.config.architectures or ())


def measure_similarity(run: Run, arms: Mapping[str, Arm]) -> None:
    """Compare every arm's answers to paragraphs of the texts."""
    texts = paragraphs(run.texts)
    tokenizer = run.session.loaded.tokenizer

    def compare(arm: Arm) -> dict[str, Any]:
        return similarity(arm.model, run.truth, tokenizer, texts)

    for label, found in run.pieces(arms, compare, "embedding paragraphs").items():
        result = arms[label].result
        result.fidelity.max_abs_err_vs_fp32, result.fidelity.top1 = found.pop("max_abs_err"), found.pop("top1")
        assert result.details is not None
        result.details["similarity"] = found


def paragraphs(texts: Sequence[str]) -> list[str]:
    """Up to ``PARAGRAPHS`` paragraphs of more than five words, evenly spread; raises ``ValueError`` for none."""
    found = [" ".join(part.split()) for text in texts for part in text.split("\n\n") if len(part.split()) > 5]
    if not found:
        raise ValueError("the text has no paragraph of more than five words")
    chosen = min(PARAGRAPHS, len(found))
    return [found[i * len(found) // chosen] for i in range(chosen)]
