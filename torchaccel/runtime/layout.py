"""What is stored of the keys or the values of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torchaccel.kernels.spec import KVFormat

from .eviction import Eviction
from .factors import Factors
from .mixing import Mixing
from .selection import Selection


@dataclass(frozen=True)
class Layout:
    """What a logical KV tensor stores physically; hashable, and guarded by the compiled graphs.

    pruned: only some tokens are stored. positions: and each slot carries its logical column (of keys; the values of
    the same slots need none). eviction: the policy by which tokens go. selection: that by which a step chooses what it
    reads; its state lies with the keys. offload: folder of the file in which the tokens lie, None for memory. home:
    the device that attends to tokens in host memory, None where they lie on it. prefixes: number of buffers of other
    storages that hold the first columns. factors: of a format that stores latents. mixing: how all but the newest
    tokens are sorted into classes.
    """

    format: KVFormat
    positions: bool = False
    pruned: bool = False
    eviction: Eviction | None = None
    selection: Selection | None = None
    offload: str | None = None
    home: str | None = None
    prefixes: int = 0
    factors: Factors | None = None
    mixing: Mixing | None = None

    @property
    def turned(self) -> bool:
        """Whether tokens are embedded by their position when they are read, for which a storage has a rotary table."""
        return self.factors is not None and self.factors.rotary > 0

    @property
    def ragged(self) -> bool:
        """Whether KV heads store different numbers of tokens, see ``RaggedStorage``."""
        return self.eviction is not None and self.eviction.ragged
