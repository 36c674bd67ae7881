"""How likely a variant finds real text, and how far its next-token distributions are from the float32 model's.

Every window is read the way a user's text is: ``model.generate`` takes a prompt at once, then token by token the text
that follows, each step scored. One pass over the whole window would never read the cache, so a cache compressed to
nothing would lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from ..arms import Arm
from ..generate import generate
from ..intervals import paired_ratio
from ..results import Fidelity
from .run import Run

BUCKETS = 4


@dataclass(frozen=True)
class Scores:
    """What a batch of windows gave, each ``[B, T]`` over the scored tokens; the last two over the whole batch.

    nll: negative log-likelihood of the next token in nats; reference_nll: the float32 model's. kl: KL(float32 ||
    variant) in nats. top1: whether both find the same token most likely.
    """

    nll: Tensor
    reference_nll: Tensor
    kl: Tensor
    top1: Tensor
    max_abs_err: float
    kv_bytes: int

    def to_dict(self, rows: int, buckets: int = BUCKETS) -> dict[str, Any]:
        """Sums by window and position bucket as JSON values, of the first ``rows`` windows."""
        sums = {
            name: [
                [part.double().sum().item() for part in row.tensor_split(buckets)] for row in getattr(self, name)[:rows]
            ]
            for name in ("nll", "reference_nll", "kl", "top1")
        }
        tokens = [len(part) for part in self.nll[0].tensor_split(buckets)]
        return sums | {"tokens": tokens, "max_abs_err": self.max_abs_err, "kv_bytes": self.kv_bytes}


@torch.no_grad()
def reference_logits(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """The float32 ``model``'s logits ``[B, S - prompt, V]`` for all tokens ``[B, S]`` after the prompt."""
    return model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - prompt + 1).logits[:, :-1]


def score(model: Any, tokens: Tensor, prompt: int, reference: Tensor) -> Scores:
    """Read ``tokens`` ``[B, S]`` with ``model``, the first ``prompt`` at once, and score the others.

    reference: from ``reference_logits``.
    """
    import torchaccel

    reader = Reader(tokens, prompt, reference)
    out = generate(model, tokens[:, :prompt], tokens.shape[1] - prompt, processors=[reader])
    return reader.scores(torchaccel.kv_bytes(out.past_key_values))


class Reader:
    """A logits processor for ``generate`` that compares every step with the reference, then forces the real token."""

    def __init__(self, tokens: Tensor, prompt: int, reference: Tensor) -> None:
        self._tokens = tokens
        self._prompt = prompt
        self._reference = reference
        self._columns: dict[str, list[Tensor]] = {"nll": [], "reference_nll": [], "kl": [], "top1": []}
        self._worst = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` ``[B, s]`` so far, ``scores`` ``[B, V]`` of the next token: all but the real one go."""
        step = input_ids.shape[1]
        ours, truth = scores.float(), self._reference[:, step - self._prompt]
        target = self._tokens[:, step, None]
        self._worst = max(self._worst, (ours - truth).abs().max().item())
        own, wanted = ours.log_softmax(-1), truth.log_softmax(-1)
        self._columns["nll"].append(-own.gather(1, target)[:, 0])
        self._columns["reference_nll"].append(-wanted.gather(1, target)[:, 0])
        self._columns["kl"].append((wanted.exp() * (wanted - own)).sum(-1).clamp_min(0.0))
        self._columns["top1"].append(ours.argmax(-1) == truth.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, target, 0.0)

    def scores(self, kv_bytes: int) -> Scores:
        """Everything seen; ``kv_bytes``: of the cache at the end."""
        columns = {name: torch.stack(values, 1) for name, values in self._columns.items()}
        return Scores(**columns, max_abs_err=self._worst, kv_bytes=kv_bytes)


def summarise(batches: list[dict[str, Any]], bytes_per_token: float, prompt: int) -> tuple[Fidelity, dict[str, Any]]:
    """Perplexity and agreement of a variant over all windows, and the details by position bucket.

    batches: ``Scores.to_dict`` of every batch. bytes_per_token: of the scored text.
    """
    tokens = torch.tensor(batches[0]["tokens"], dtype=torch.float64)
    sums = {
        name: torch.tensor([row for batch in batches for row in batch[name]], dtype=torch.float64)
        for name in ("nll", "reference_nll", "kl", "top1")
    }
    windows, scored = len(sums["nll"]), tokens.sum().item()
    log_ratios = (sums["nll"] - sums["reference_nll"]) / tokens
    ratio, interval = paired_ratio(((log_ratios * tokens).sum(1) / scored).tolist())
    mean = sums["nll"].sum().item() / (windows * scored)
    fidelity = Fidelity(
        max_abs_err_vs_fp32=max(batch["max_abs_err"] for batch in batches),
        kl=sums["kl"].sum().item() / (windows * scored),
        top1=sums["top1"].sum().item() / (windows * scored),
        perplexity=exp(mean),
        perplexity_ratio=ratio,
        perplexity_ratio_ci95=interval,
        bits_per_byte=mean / log(2) / bytes_per_token,
    )
    buckets = []
    start = prompt
    for index, count in enumerate(tokens.int().tolist()):
        part_ratio, part_interval = paired_ratio(log_ratios[:, index].tolist())
        perplexity = exp(sums["nll"][:, index].sum().item() / (windows * count))
        buckets.append({"from": start, "to": start + count, "perplexity": perplexity})
        buckets[-1] |= {"ratio": part_ratio, "ratio_ci95": part_interval}
        start += count
    details = {
        "window": start,
        "windows": windows,
        "tokens": int(windows * scored),
        "bytes": round(windows * scored * bytes_per_token),
        "buckets": buckets,
    }
    return fidelity, details


def measure_likelihood(run: Run, arms: Mapping[str, Arm]) -> None:
    """Read all windows with every arm: perplexity, agreement and bytes of the cache."""
    batches: dict[str, list[dict[str, Any]]] = {}
    for index, (tokens, rows) in enumerate(run.batches()):
        for label, sums in _read(run, arms, index, tokens, rows).items():
            batches.setdefault(label, []).append(sums)
    for label, parts in batches.items():
        result = arms[label].result
        if result.status == "failed":
            continue
        result.fidelity, details = summarise(parts, run.bytes_per_token, run.case.prompt)
        result.kv_bytes = parts[0]["kv_bytes"]
        assert result.details is not None
        result.details["perplexity"] = details
        fidelity = result.fidelity
        result.details["agreement"] = {"tokens": details["tokens"], "kl": fidelity.kl, "top1": fidelity.top1}
    eager = arms.get("eager")
    for arm in arms.values():
        if eager is not None:
            arm.result.fidelity.eager_max_abs_err_vs_fp32 = eager.result.fidelity.max_abs_err_vs_fp32


def _read(run: Run, arms: Mapping[str, Arm], index: int, tokens: Tensor, rows: int) -> dict[str, dict[str, Any]]:
    """One batch with every arm: the first ``rows`` of ``tokens`` ``[B, S]`` count."""
    reference: list[Tensor] = []

    def read(arm: Arm) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            if not reference:
                reference.append(reference_logits(run.truth, tokens, run.case.prompt))
            return score(arm.model, tokens, run.case.prompt, reference[0]).to_dict(rows)

        return dict(run.remember(arm, "likelihood", compute, batch=index))

    return run.pieces(arms, read, f"reading the text, {index + 1} of {run.batch_count}")
