"""Which candidate a compiled graph calls for each kernel: by what was measured, else by the cost model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torchaccel.kernels.candidates import candidates
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.prompt_selectors.base import BlockSelector
from torchaccel.kernels.sparse_prompt import listed
from torchaccel.kernels.spec import AttentionSpec

from torchaccel.cost.choose import Tuned, Verdict, candidate_ms, choose, gate
from torchaccel.cost.facts import DeviceFacts
from torchaccel.cost.roofline import INFEASIBLE
from torchaccel.cost.shape import AttentionShape


class Chooser:
    """The choices of one compilation; equal sites are decided once.

    compared: specs and shapes of the kernels that verdicts are about.
    """

    def __init__(self, device: torch.device, facts: DeviceFacts | None = None, tuned: Tuned | None = None):
        """facts: what the device can do; None takes every kernel's seed, the first of its candidates."""
        self.device = device
        self.facts = facts
        self.tuned = tuned
        self._plans: dict[tuple[AttentionSpec, AttentionShape], Plan] = {}
        self.compared: list[tuple[AttentionSpec, AttentionShape]] = []
        self._verdicts: dict[tuple[AttentionSpec | BlockSelector, AttentionSpec, AttentionShape], Verdict] = {}

    def plan(self, spec: AttentionSpec, shape: AttentionShape) -> Plan:
        """The candidates of an attention kernel over all numbers of stored tokens; ``shape.tokens`` is ignored."""
        found = self._plans.get((spec, shape))
        if found is None:
            choices = candidates(spec, self.device.type)
            if self.facts is None:
                found = Plan(spec, ((None, choices[0]),))
            else:
                found = choose(spec, choices, shape, self.facts, self.tuned)
            self._plans[spec, shape] = found
        return found

    def verdict(self, asked: AttentionSpec, exact: AttentionSpec, shape: AttentionShape) -> Verdict | None:
        """Whether a lossy site pays, each with its best candidate; None without facts of the device."""
        if self.facts is None:
            return None
        key = asked, exact, shape
        if key not in self._verdicts:
            self.compared += [(asked, shape), (exact, shape)]
            self._verdicts[key] = gate(asked, exact, shape, self.facts, self.tuned)
        return self._verdicts[key]

    def sparse_verdict(self, selector: BlockSelector, exact: AttentionSpec, shape: AttentionShape) -> Verdict | None:
        """Whether lists of blocks pay, what they cost to choose included; None without facts of the device."""
        if self.facts is None:
            return None
        key = selector, exact, shape
        if key not in self._verdicts:

            def density(tokens: int) -> float:
                # Of all pairs: half of them are causal.
                seen = (tokens + 1) / (2 * tokens) if selector.causal else 1.0
                return seen * (selector.share(tokens) + selector.effort(tokens))

            asked = listed(exact, selector)
            found = gate(asked, exact, shape, self.facts, self.tuned, density=density)
            pairs = "causal pairs" if selector.causal else "pairs"
            assumed = f"{found.text}, of which {selector.share(shape.tokens):.2g} of the {pairs} are thought to be read"
            self._verdicts[key] = replace(found, text=assumed)
        return self._verdicts[key]

    def predicted_ms(self, plan: Plan, shape: AttentionShape) -> float | None:
        """Milliseconds of one call of a plan with ``shape.tokens`` stored; None without facts of the device."""
        if self.facts is None:
            return None
        ms = candidate_ms(plan.spec, plan.pick(shape.tokens), shape, self.facts, self.tuned)
        return None if ms == INFEASIBLE else ms
