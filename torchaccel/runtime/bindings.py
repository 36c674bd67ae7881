"""How the inputs and outputs of a rewritten graph meet the model's: which are caches, and what they become."""

from __future__ import annotations

from dataclasses import dataclass

from .storage import Layout


@dataclass(frozen=True)
class TokenCount:
    """Where a call's number of new tokens is found: a constant, or dimension ``dim`` of argument ``argument``."""

    constant: int | None = None
    argument: int = -1
    dim: int = 0

    def of(self, args: tuple[object, ...]) -> int:
        """The number for these arguments."""
        if self.constant is not None:
            return self.constant
        found = args[self.argument]
        return found if isinstance(found, int) else int(found.shape[self.dim])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class AppendBinding:
    """A layer that appends to its cache in this graph.

    key_argument, value_argument: positions of the past keys and values among the graph's arguments. key_output,
    value_output: positions of the updated ones among its results. key_layout, value_layout: what the graph was compiled
    for; plain tensors that a cache brings along are stored so, and prefixes that it does not share are copied. window:
    tokens kept afterwards (sliding-window layers keep window - 1). skipped: the layer does not run; only the logical
    length advances. evicts: tokens may go after a call. mass_output: result that holds the attention every slot
    received, where the policy wants it; group: query heads of a KV head.
    """

    key_argument: int
    value_argument: int
    key_output: int
    value_output: int
    key_layout: Layout
    value_layout: Layout
    tokens: TokenCount
    window: int | None = None
    positions: bool = False
    skipped: bool = False
    evicts: bool = False
    mass_output: int | None = None
    group: int = 1

    @property
    def prefixes(self) -> int:
        """Number of shared prefixes whose buffers the graph takes."""
        return self.key_layout.prefixes


@dataclass(frozen=True)
class PromptBinding:
    """What a policy that evicts tokens wants of a prompt, as positions among the graph's results.

    queries_output: the last queries ``[B, H, w, D]``. mass_output, plain_output, table_outputs, pairs: see
    ``eviction.Prompt``. mask_output: the mask's last row, None when nothing is masked.
    """

    queries_output: int
    mass_output: int | None
    mask_output: int | None
    scale: float
    layer: int
    layers: int
    plain_output: int | None = None
    table_outputs: tuple[int, int] | None = None
    pairs: str = "half"


@dataclass(frozen=True)
class StoreBinding:
    """A layer whose prompt keys and values come out of this graph and are put into storage.

    positions_output: result that holds the columns int64 ``[B, K]`` of pruned tokens; tokens: the logical length where
    that cannot be read off the keys. prompt: for layouts that evict.
    """

    key_output: int
    value_output: int
    key_layout: Layout
    value_layout: Layout
    positions_output: int | None = None
    tokens: TokenCount | None = None
    prompt: PromptBinding | None = None


@dataclass(frozen=True)
class Bindings:
    """The whole signature of a rewritten graph.

    arguments: original arguments passed through, in order; after them come, for each append that is not skipped, key
    buffer, value buffer, positions (when pruned), key and value buffer of each shared prefix, and lens (int64 ``[3]``,
    with prefixes ``[1 + prefixes, 3]``). results: for each result of the compiled graph its position among the model's;
    positions from ``result_count`` on are for the stores and for shares: where sparse prompts say what part of the
    causal pairs they read.
    """

    arguments: tuple[int, ...]
    appends: tuple[AppendBinding, ...]
    stores: tuple[StoreBinding, ...]
    results: tuple[int, ...]
    result_count: int
    shares: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """Results and extra results together."""
        return max((self.result_count, *(position + 1 for position in self.results)))
