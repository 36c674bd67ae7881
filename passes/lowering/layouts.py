"""What the caches of a site store under its plan."""

from __future__ import annotations

from typing import Any

from torchaccel.kernels.spec import KVFormat, dtype_name

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.layout import Layout

from ..base import SitePlan
from ..retrieving import HOST


def layouts_of(site: AttentionSite, plan: SitePlan) -> tuple[Layout, Layout]:
    """The layouts of a site's keys and values under its plan."""
    plain = KVFormat("empty" if plan.dropped else "dense", dtype_name(site.dtype), site.head_dim)
    keys, values = (plain, plain) if plan.dropped or plan.formats is None else plan.formats
    if plan.eviction is not None and plan.eviction.ragged and not plan.dropped:
        keys, values = plain, plain
    mixing = None if plan.dropped else plan.mixing
    some = plan.keep is not None or plan.eviction is not None or mixing is not None
    pruned = some and not plan.dropped
    of_keys, of_values = (
        factors if fmt.kind == "latent" else None for fmt, factors in zip((keys, values), plan.factors, strict=True)
    )
    selection = None if plan.dropped else plan.remembered
    both: dict[str, Any] = {"pruned": pruned, "eviction": plan.eviction, "mixing": mixing}
    if plan.offload == HOST:
        both["home"] = str(site.node.meta["example_value"].device)
    else:
        both["offload"] = plan.offload
    return (
        Layout(keys, positions=pruned, selection=selection, factors=of_keys, **both),
        Layout(values, factors=of_values, **both),
    )
