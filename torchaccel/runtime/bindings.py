"""How the inputs and outputs of a rewritten graph meet the model's: which are caches, and what they become."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Layout


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
    received, where the policy wants it; group: query heads of a KV head. ids_output, queries_output: results that hold
    the new tokens' ids, and the last of their queries ``[B, H, w, D]``, where it wants those (mixed layouts: all
    of them). table: this layer's is the first with its rotary table, which the graph takes. scale: of q . k.
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
    ids_output: int | None = None
    queries_output: int | None = None
    table: bool = False
    scale: float = 1.0

    @property
    def prefixes(self) -> int:
        """Number of shared prefixes whose buffers the graph takes."""
        return self.key_layout.prefixes

    @property
    def mixed(self) -> bool:
        """Whether the graph takes the buffers of classes of tokens."""
        return self.key_layout.mixing is not None


@dataclass(frozen=True)
class PromptBinding:
    """What a policy that evicts or selects tokens wants of a prompt, as positions among the graph's results.

    queries_output: the last queries ``[B, H, w, D]``. mass_output, plain_output, table_outputs, pairs, ids_output: see
    ``eviction.Prompt``; ids are of all tokens, those that were pruned included. mask_output: the mask's last row, None
    when nothing is masked. image_outputs: masks, bool ``[B, N]``, that tell images together, of all tokens, too.
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
    ids_output: int | None = None
    image_outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class LatentBinding:
    """What is stored of a prompt as latents, as positions among the graph's results.

    keys_output, values_output: latents ``[B, H_kv, S, rank]``, None where the tokens themselves are stored.
    table_outputs: cosine and sine ``[B | 1, .., S, R]`` of keys that have rotary embedding.
    """

    keys_output: int | None
    values_output: int | None
    table_outputs: tuple[int, int] | None


@dataclass(frozen=True)
class StoreBinding:
    """A layer whose prompt keys and values come out of this graph and are put into storage.

    positions_output: result that holds the columns int64 ``[B, K]`` of pruned tokens; tokens: the logical length where
    that cannot be read off the keys. prompt: for layouts that evict or select. latents: for layouts with factors.
    follows: which of the stores keeps the same tokens, and chooses them for both; it comes first.
    """

    key_output: int
    value_output: int
    key_layout: Layout
    value_layout: Layout
    positions_output: int | None = None
    tokens: TokenCount | None = None
    prompt: PromptBinding | None = None
    latents: LatentBinding | None = None
    follows: int | None = None


@dataclass(frozen=True)
class Bindings:
    """The whole signature of a rewritten graph.

    arguments: original arguments passed through, in order; after them come, for each append that is not skipped, key
    buffer, value buffer, positions (when pruned), table and tails (when ragged), key and value buffer of each shared
    prefix, key buffer, value buffer and positions of each class and the scale of values (when mixed), lens (int64
    ``[3]``, with prefixes or classes ``[1 + their number, 3]``, when ragged ``[4]``), the rotary table of the first
    layer that has it, and the state of the layout's selection. results: for each result of the compiled graph its
    position among the model's; positions from ``result_count`` on are for the stores, and for shares: where sparse
    prompts and encoders say what part of the pairs they read.
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
