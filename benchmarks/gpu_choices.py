"""The GPU cases of choosing blocks: summaries of one new key, the choice of a decode step, and that of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_bench import HEAD_DIM, HEADS, KV_HEADS, Bench, on_cpu, random
from torch import Tensor
from torchaccel.kernels import selection_reference
from torchaccel.kernels.selection_spec import PromptSelectionSpec, SelectionSpec, SummarySpec
from torchaccel.kernels.triton import prompt_selection, selection, summary

GROUP, SCALE = HEADS // KV_HEADS, HEAD_DIM**-0.5
# Scores are float32 sums in another order, per unit of the largest.
TOLERANCE = 1e-5

PAGES = SummarySpec("minmax", HEAD_DIM, "bfloat16", "bfloat16")
MEANS = SummarySpec("mean", HEAD_DIM, "bfloat16", "bfloat16")
LABELS = SummarySpec("channels", HEAD_DIM, "bfloat16", "bfloat16", 1, 16)
# By name: the spec for so many entries of the result.
DECODES = {
    "select_pages": partial(SelectionSpec, PAGES, GROUP, "bfloat16", sinks=1, recent=2),
    "select_pages_mass": partial(SelectionSpec, PAGES, GROUP, "bfloat16", scale=SCALE, sinks=1, recent=2, mass=0.9),
    "select_means_softmax": partial(SelectionSpec, MEANS, GROUP, "bfloat16", reduce="softmax", scale=SCALE, sinks=1),
    "select_labels": partial(SelectionSpec, LABELS, GROUP, "bfloat16"),
}
PROMPTS = {
    "select_prompt_antidiagonal": partial(PromptSelectionSpec, "antidiagonal", HEAD_DIM, GROUP, "bfloat16", SCALE),
    "select_prompt_mean": partial(PromptSelectionSpec, "mean", HEAD_DIM, GROUP, "bfloat16", SCALE),
}


def cases(bench: Bench, batch: int, length: int, only: str) -> Iterator[dict[str, Any]]:
    """Results of every case whose name contains ``only``, over ``length`` tokens."""
    for name, spec in DECODES.items():
        if only in name:
            yield {"kind": name} | decode(bench, spec(width=max(4, length // 16 // _block(spec))), batch, length)
    for name, prompt in PROMPTS.items():
        if only in name:
            yield {"kind": name} | prompts(bench, prompt(width=max(4, length // 16 // 64)), length)


def decode(bench: Bench, spec: SelectionSpec, batch: int, length: int) -> dict[str, Any]:
    """Check and time the summary of one more key, and the choice of a sixteenth of what is kept."""
    kept = spec.summary
    k, q = random(batch, KV_HEADS, length), random(batch, HEADS, 1)
    channels = None
    if kept.kind == "channels":
        chosen = [torch.randperm(HEAD_DIM)[: kept.channels] for _ in range(KV_HEADS)]
        channels = torch.stack(chosen).to("cuda", torch.int32)
    start, before, lens = (torch.tensor([0, n, n]) for n in (0, length - 1, length))
    stored = selection_reference.allocate(kept, batch, KV_HEADS, length + 64, q.device)
    update = summary.summarise(kept)
    update(k[:, :, :-1], *stored, start, None, channels)
    update(k[:, :, -1:], *stored, before, None, channels)
    expected = [x.cpu() for x in selection_reference.allocate(kept, batch, KV_HEADS, length + 64, torch.device("cpu"))]
    selection_reference.summarise(kept, *on_cpu(k), *expected, start, None, *on_cpu(channels))
    rows = -(-length // kept.block)
    same = torch.equal(stored[0][:, :, :rows].cpu(), expected[0][:, :, :rows])

    args = (q, stored[0], lens, None, channels)
    scores = selection.scores(spec)(*args).cpu()
    begin, end = torch.zeros(batch, 1, dtype=torch.int64), torch.full((batch, 1), -(-length // spec.block))
    choice = selection_reference.choose(spec, scores, begin, end)
    agreement = _compare(scores, selection_reference.scores(spec, *on_cpu(*args)))
    agreement["agrees"] &= same and torch.equal(choice, selection.select(spec)(*args).cpu())
    ms = bench.ms(lambda: selection.select(spec)(*args))
    read = stored[0][:, :, :rows].nbytes
    line = {"batch": batch, "length": length, "width": spec.width, **agreement, **bench.roofline(ms, read=read)}
    line["reference_ms"] = bench.ms(lambda: selection_reference.select(spec, *args))
    line["summarise_ms"] = bench.ms(lambda: update(k[:, :, -1:], *stored, before, None, channels))
    return line | {"launch_us": bench.launch_us(lambda: selection.select(spec)(*args))}


def prompts(bench: Bench, spec: PromptSelectionSpec, length: int) -> dict[str, Any]:
    """Check the choice for a prompt of 2048 tokens, then time that for ``length``."""
    run, check = prompt_selection.select_prompt(spec), min(length, 2048)
    small = (random(1, HEADS, check), random(1, KV_HEADS, check))
    scores = prompt_selection.prompt_scores(spec)(*small).cpu()
    agreement = _compare(scores, selection_reference.prompt_scores(spec, *on_cpu(*small)))
    begin, end = torch.zeros(1, 1, 1, dtype=torch.int64), torch.arange(1, scores.shape[-1] + 1)[None, None]
    agreement["agrees"] &= torch.equal(selection_reference.choose(spec, scores, begin, end), run(*small).cpu())
    q, k = random(1, HEADS, length), random(1, KV_HEADS, length)
    # Below the diagonal of the tiles' rows, twice: for the sums of the softmax, and for its values.
    rows, each = (length / spec.stride, 2 * spec.stride) if spec.probabilities else (length / spec.block, 1)
    flops = HEADS * rows**2 * each * HEAD_DIM
    ms = bench.ms(lambda: run(q, k))
    line = {"batch": 1, "length": length, "width": spec.width, **agreement}
    return line | bench.roofline(ms, read=q.nbytes + k.nbytes, flops=flops)


def _block(spec: partial[SelectionSpec]) -> int:
    """Slots of one entry of the result."""
    return spec.args[0].block


def _compare(got: Tensor, expected: Tensor) -> dict[str, Any]:
    finite = expected.isfinite()
    error = float((got - expected)[finite].abs().max() / expected[finite].abs().max())
    agrees = error <= TOLERANCE and torch.equal(got[~finite], expected[~finite])
    return {"agrees": agrees, "largest_error": error}
