"""What all methods share that store every token in fewer bits: KIVI's layout, and the sites they refuse."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torchaccel.kernels.spec import KVFormat, dtype_name

from torchaccel.graph.anatomy import AttentionSite

from ..base import Decline, Fidelity, Reason, SitePlan
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache

# Tokens that are quantised together; a tail of up to as many stays in full precision until it is full.
BLOCK = 64


class GroupedOptions(LayerwiseOptions):
    """group: values that share a scale and a minimum: tokens of a channel of keys, channels of a token of values.
    window: most recent tokens that stay in full precision at least; up to 63 (127 for groups of 128) more do."""

    group: Literal[32, 64, 128] = 64
    window: int = Field(default=64, ge=0, le=4096)


class QuantisingMethod(LayerwiseMethod):
    """Keys per channel along the tokens, for they have a few large channels; values per token, for they have none."""

    family = "kv_compression"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    stores = True
    kind: ClassVar[Literal["int8", "int4", "int2"]] = "int8"

    def refuse(self, site: AttentionSite) -> Decline | None:
        problem = refuse_cache(site, sliding=True)
        if problem is None and site.head_dim % 8:
            problem = Decline(site.name, Reason.KERNEL_UNSUPPORTED, f"head_dim {site.head_dim} % 8 != 0")
        return problem

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        plan.formats = self.formats(dtype_name(site.dtype), site.head_dim)

    def formats(self, dtype: str, head_dim: int) -> tuple[KVFormat, KVFormat]:
        """How keys and values are stored."""
        group, window = getattr(self.options, "group", 0), getattr(self.options, "window", 0)
        block = max(BLOCK, group)
        # A group of channels that does not divide the head is the whole head.
        channels = group if group and head_dim % group == 0 else 0
        return (
            KVFormat(self.kind, dtype, head_dim, "channel", block, group, window),
            KVFormat(self.kind, dtype, head_dim, "token", block, channels, window, "token"),
        )
