"""Which KV heads need the whole context: one gate per head, trained on passkeys (DuoAttention, arXiv 2410.10819)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchaccel.errors import CalibrationError

from .calibrator import Calibrator, Collector

Attend = Callable[..., Tensor]

GATES = "site{}.gates"
PASSKEYS = 8
# Of the publication: learning rate, weight of the mean gate in the loss, shares of the steps that warm up and decay.
RATE, PENALTY, WARM_UP, DECAY, FLOOR = 0.02, 0.05, 0.2, 0.2, 0.1


class HeadGates(Calibrator):
    """Mixes full attention and that of sinks and recent tokens in every KV head, and learns how much of which it needs.

    The model reads texts with passkeys that it is asked for at the end, once as it is and once mixed: the output of a
    head is then ``gate`` times what it was, and ``1 - gate`` times its attention without what lies between. The gates
    minimise how far the hidden states that predict the answers are from what they were, and themselves. A method's
    options have ``sinks``, ``recent`` and ``steps``; the plan has a tensor ``[H_kv]`` for every attention.
    """

    def run(self, collector: Collector) -> dict[str, Tensor]:
        texts = self._texts(collector)
        device = next(collector.model.parameters()).device
        gates = [torch.ones(site.kv_heads, device=device, requires_grad=True) for site in collector.sites]
        whole: dict[int, Tensor] = {}

        def note(site: int, attend: Attend, *inputs: Any) -> Tensor:
            whole[site] = attend(*inputs)
            return whole[site]

        def mix(site: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: bool) -> Tensor:
            near = window(q.shape[2], self.options.sinks, self.options.recent, q.device)
            if mask is not None:
                near = mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, -torch.inf)
            gate = gates[site].repeat_interleave(q.shape[1] // k.shape[1])[None, :, None, None].to(q.dtype)
            return gate * whole[site] + (1 - gate) * attend(q, k, v, near, False)

        exact, mixed = collector.replaced(note), collector.replaced(mix)
        optimiser = torch.optim.AdamW(gates, lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, self.options.steps))
        generator = torch.Generator().manual_seed(self.seed)
        with _frozen(collector.model):
            for step in collector.progress(range(self.options.steps)):
                ids, answers = passkeys(texts[step % len(texts)], generator)
                ids, answers = ids.to(device), answers.to(device)
                with torch.no_grad():
                    wanted = last_states(exact(input_ids=ids))[:, answers].float()
                found = last_states(mixed(input_ids=ids))[:, answers].float()
                loss = (found - wanted).square().mean() + PENALTY * torch.cat(gates).abs().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                for gate in gates:
                    gate.data.clamp_(0.0, 1.0)
        return {GATES.format(site): gate.detach() for site, gate in enumerate(gates)}

    def _texts(self, collector: Collector) -> list[Tensor]:
        """The rows of all batches without their padding, those that are long enough to tell heads apart."""
        found = []
        for batch in collector.batches:
            masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            found += [row[mask.bool()].cpu() for row, mask in zip(batch["input_ids"], masks, strict=True)]
        needed = 2 * (self.options.sinks + self.options.recent)
        long = [row for row in found if row.shape[0] >= max(needed, 8 * PASSKEYS)]
        if not long:
            raise CalibrationError(
                f"asked to tell heads that need more than {self.options.sinks} first and {self.options.recent} last "
                f"tokens; no text has twice as many, {needed}. Give longer windows (--window), or smaller sinks and "
                "recent"
            )
        return long


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model without gradients of its weights."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def retrieval_heads(gates: Sequence[Tensor], sparsity: float, seed: int = 0) -> list[tuple[int, ...]]:
    """The KV heads of each layer that see everything: all but the share ``sparsity`` whose gates ``[H_kv]`` are lowest.

    Of equal gates some are taken by chance, by ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = torch.cat([gate.detach().cpu().double() for gate in gates]).clamp(0, 1)
    flat = flat + 1e-6 * torch.rand(flat.shape, generator=generator, dtype=flat.dtype)
    wide = flat >= flat.quantile(sparsity) if sparsity < 1 else torch.zeros_like(flat, dtype=torch.bool)
    parts = wide.split([gate.shape[0] for gate in gates])
    return [tuple(part.nonzero().flatten().tolist()) for part in parts]


def gates_of(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The gates of a plan, layer by layer."""
    return [tensors[GATES.format(site)] for site in range(len(tensors))]


def passkeys(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``text`` int64 ``[S]`` with passkeys at random depths, which are asked for at its end: ``[1, S]`` and answers.

    A passkey is a random sequence of the text's tokens; its first quarter is repeated at the end, in any order of
    passkeys, and the rest is the answer. answers: int64 ``[n]``, the places whose next tokens those are.
    """
    tokens = text.shape[0]
    size = min(max(tokens // 64, 4), 32)
    known = text.unique()
    keys = known[torch.randint(known.shape[0], (PASSKEYS, size), generator=generator)]
    room = tokens - 2 * PASSKEYS * size
    depths = (torch.rand(PASSKEYS, generator=generator) * 0.9 + 0.05).mul(room).long().sort().values.tolist()
    parts, last = [], 0
    for key, depth in zip(keys, depths, strict=True):
        parts += [text[last:depth], key]
        last = depth
    parts += [text[last:room], *keys[torch.randperm(PASSKEYS, generator=generator)]]
    place = torch.arange(PASSKEYS * size)
    answers = place[place % size >= max(size // 4, 1)] + tokens - PASSKEYS * size - 1
    return torch.cat(parts)[None], answers


def window(tokens: int, sinks: int, recent: int, device: torch.device) -> Tensor:
    """What tokens see of those before them, bool ``[S, S]``: the first ``sinks`` and the last ``recent``."""
    key = torch.arange(tokens, device=device)
    query = key[:, None]
    return (key <= query) & ((key < sinks) | (query - key < recent))


def rate(step: int, steps: int) -> float:
    """Share of the learning rate in a step: it rises at first, and falls at last."""
    left = (steps - step) / max(DECAY * steps, 1)
    return max(FLOOR, min((step + 1) / max(WARM_UP * steps, 1), left, 1.0))


def last_states(results: Any) -> Tensor:
    """What a model's body computes: its last hidden states ``[B, S, d]``, or the first of its results."""
    if isinstance(results, Tensor):
        return results
    found = getattr(results, "last_hidden_state", None)
    return results[0] if found is None else found
