"""The table of all methods, by family."""

from __future__ import annotations

from typing import Any

from torchaccel.passes import kv_compression, layer_skipping, sparse_attention, token_pruning
from torchaccel.passes.base import Method

# Also the order in which the families rewrite a graph: fewer tokens, fewer layers, smaller caches, fewer keys read.
FAMILIES: dict[str, tuple[type[Method], ...]] = {
    "token_pruning": token_pruning.METHODS,
    "layer_skipping": layer_skipping.METHODS,
    "kv_compression": kv_compression.METHODS,
    "sparse_attention": sparse_attention.METHODS,
}


def names(family: str) -> dict[str, type[Method]]:
    """Every name and alias of a family's methods."""
    return {name: method for method in FAMILIES[family] for name in (method.name, *method.aliases)}


def list_methods(family: str | None = None) -> list[dict[str, Any]]:
    """Facts and options schema of each method, as ``torchaccel methods --json`` prints them."""
    return [
        {
            "family": name,
            "method": method.name,
            "aliases": list(method.aliases),
            "fidelity": method.fidelity.value,
            "phases": sorted(method.phases),
            "calibration": method.calibration,
            "paper": method.paper,
            "options_schema": method.Options.model_json_schema(),
        }
        for name, methods in FAMILIES.items()
        for method in methods
        if family in (None, name)
    ]
