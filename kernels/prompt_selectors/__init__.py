"""Policies that choose which blocks of keys every block of queries reads, from queries and keys alone."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from .adaptive import AdaptiveLines
from .base import BlockSelector
from .covering import CoveringLines
from .estimated import EstimatedBlocks
from .patterns import HeadPatterns
from .regions import RoutedRegions
from .semantic import SemanticBlocks
from .static import ChunkedBlocks, StridedBlocks

KINDS: dict[str, type[BlockSelector]] = {
    kind.__name__: kind
    for kind in (
        EstimatedBlocks,
        HeadPatterns,
        AdaptiveLines,
        CoveringLines,
        StridedBlocks,
        ChunkedBlocks,
        SemanticBlocks,
        RoutedRegions,
    )
}


@lru_cache(maxsize=1024)
def from_key(key: str) -> BlockSelector:
    """The selector whose ``key()`` is ``key``."""
    fields = json.loads(key)
    kind = KINDS[fields.pop("kind")]
    return kind(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
