"""Declines lossy sites that would be slower than exact ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torchaccel.kernels.spec import AttentionSpec, KVFormat, dtype_name

from torchaccel.cost.choose import Verdict
from torchaccel.cost.shape import AttentionShape
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.selection import Selection

from ..base import Decline, Reason, SitePlan
from .choice import Chooser

# A cache is stored before anyone knows how long it will grow: a site is judged by whether it pays at any length, and
# the numbers in the decline are those of this many tokens.
TOKENS = 32_768

# Times the exact site's time that a cache of fewer bytes may take: bytes are what it was asked for, and predictions for
# heads of unusual size are off by a quarter. Without a generated kernel the factor is 5 and more.
WORTH = 1.5

MakeSpec = Callable[[AttentionSite, SitePlan, str, KVFormat, KVFormat], AttentionSpec]


@dataclass(frozen=True)
class Gate:
    """Judges the plan of a site; ``enabled`` False lets every plan pass."""

    chooser: Chooser
    make_spec: MakeSpec
    enabled: bool

    def judge(self, site: AttentionSite, plan: SitePlan, phase: str, batch: int, sites: int) -> Judgement:
        """The part of ``plan`` that pays in a graph of ``phase``; ``sites``: the attention layers of the model."""
        notes: list[str] = []
        declines: list[Decline] = []
        least = 0
        if not self.enabled or plan.dropped:
            return Judgement(plan, (), "")

        if plan.selection is not None:
            # As a layout: by the decode steps that it is for.
            exact = self._spec(site, replace(plan, window=None, sinks=0), "decode")
            verdict = self._lists(site, plan.selection, exact, batch, sites)
            if verdict is not None:
                notes.append(verdict.text)
            if verdict is not None and verdict.switch_tokens is None:
                declines.append(Decline(site.name, Reason.SLOWER, verdict.text))
                plan = plan.reading_all()

        def pays(asked: SitePlan, exact: SitePlan, of: str, worth: float = 1.0) -> bool:
            shape = AttentionShape(batch, site.kv_heads, TOKENS if of == "prefill" else 1, TOKENS, sites=sites)
            verdict = self.chooser.verdict(self._spec(site, asked, of), self._spec(site, exact, of), shape)
            if verdict is None:
                return True
            notes.append(verdict.text)
            if verdict.switch_tokens is not None or verdict.predicted_ms <= worth * verdict.exact_ms:
                return True
            declines.append(Decline(site.name, Reason.SLOWER, verdict.text))
            return False

        if plan.formats is not None:
            # A layout is judged by the decode steps that read it, whichever graph makes it.
            whole = replace(plan, window=None, sinks=0)
            if not pays(whole, replace(whole, formats=None), "decode", WORTH):
                plan = replace(plan, formats=None)
        if plan.window is not None and not pays(
            plan, replace(plan, window=None, sinks=0), "prefill" if phase == "prefill" else "decode"
        ):
            plan = replace(plan, window=None, sinks=0)
        if plan.selector is not None:
            shape = AttentionShape(batch, site.kv_heads, TOKENS, TOKENS, sites=sites)
            exact = self._spec(site, replace(plan, selector=None), "prefill")
            verdict = self.chooser.sparse_verdict(plan.selector, exact, shape)
            if verdict is not None:
                notes.append(verdict.text)
                least = verdict.switch_tokens or 0
                if verdict.switch_tokens is None:
                    declines.append(Decline(site.name, Reason.SLOWER, verdict.text))
                    plan = replace(plan, selector=None)
        return Judgement(plan, tuple(declines), "; ".join(notes), least)

    def least(self, policy: Selection, site: AttentionSite, exact: AttentionSpec, batch: int, sites: int) -> int:
        """Stored tokens up to which attention to everything, ``exact``, is as good as to what ``policy`` lists."""
        verdict = self._lists(site, policy, exact, batch, sites) if self.enabled else None
        # A cache that was made for lists has paid for them: where none would pay any more, those of the longest do.
        return policy.covers if verdict is None else max(policy.covers, (verdict.switch_tokens or 1) - 1)

    def _lists(
        self, site: AttentionSite, policy: Selection, exact: AttentionSpec, batch: int, sites: int
    ) -> Verdict | None:
        shape = AttentionShape(batch, site.kv_heads, 1, TOKENS, policy.share, sites, policy.listed)
        return self.chooser.verdict(retrieving(exact, policy), exact, shape)

    def _spec(self, site: AttentionSite, plan: SitePlan, phase: str) -> AttentionSpec:
        dense = KVFormat("dense", dtype_name(site.dtype), site.head_dim)
        keys, values = (dense, dense) if phase == "prefill" or plan.formats is None else plan.formats
        return self.make_spec(site, plan, phase, keys, values)


def retrieving(spec: AttentionSpec, policy: Selection) -> AttentionSpec:
    """The attention ``spec`` over what ``policy`` lists."""
    return replace(spec, index=policy.unit, index_block=policy.block)


@dataclass(frozen=True)
class Judgement:
    """What remains of a plan, the declines of what does not pay, and the predicted numbers in one line.

    least: tokens from which a prompt's ``selector`` pays.
    """

    plan: SitePlan
    declines: tuple[Decline, ...]
    text: str
    least: int = 0
