"""What all methods share that drop tokens from the cache: their budget, and the sites they refuse."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field, model_validator

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.eviction import Budget, Eviction

from ..base import Decline, Fidelity, PassResult, Reason, RewriteContext, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache


class EvictingOptions(LayerwiseOptions):
    """The budget, one of three: tokens per KV head, ratio of the prompt's length, bytes of a layer and batch row."""

    tokens: int | None = Field(default=None, ge=1)
    ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    bytes: int | None = Field(default=None, ge=1)

    default_budget: ClassVar[Budget] = Budget(ratio=0.5)

    @model_validator(mode="before")
    @classmethod
    def _own_budget(cls, given: Any) -> Any:
        """The method's own budget where none is given, so that whoever reads the options need not know it."""
        own = asdict(cls.default_budget)
        if isinstance(given, dict) and all(given.get(name) is None for name in own):
            return given | {name: value for name, value in own.items() if value is not None}
        return given

    @model_validator(mode="after")
    def _one_budget(self) -> EvictingOptions:
        given = [name for name in ("tokens", "ratio", "bytes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"the budget is one of tokens, ratio and bytes; found {' and '.join(given)}")
        return self

    @property
    def budget(self) -> Budget:
        """The budget asked for, else the method's own."""
        return Budget(self.tokens, self.ratio, self.bytes)


class EvictingMethod(LayerwiseMethod):
    """Subclasses give the policy that decides which tokens stay."""

    family = "kv_compression"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})

    options: EvictingOptions

    def apply(self, context: RewriteContext) -> PassResult:
        """Treat every attention site of the chosen layers, if the policy can be shown what it asks for."""
        if self.policy().token_ids and context.anatomy.ids is None:
            return self.result([], [Decline("graph", Reason.NO_TOKEN_IDS)])
        return super().apply(context)

    def refuse(self, site: AttentionSite) -> Decline | None:
        return refuse_cache(site, sliding=False)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.eviction = self.policy()

    def policy(self) -> Eviction:
        """The policy of one layer."""
        raise NotImplementedError

    def settings(self, *names: str) -> dict[str, Any]:
        """The budget and these options, as keyword arguments of a policy."""
        return {"budget": self.options.budget} | {name: getattr(self.options, name) for name in names}
