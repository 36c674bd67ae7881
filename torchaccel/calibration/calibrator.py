"""What a method does with a model and text to make the tensors of its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from .identity import SiteShape

Wanted = Literal["queries", "keys", "values", "plain_queries", "plain_keys", "output"]
Batch = Mapping[str, Any]
# Given a layer's number, what computes its attention, its q, k, v, mask and whether it is causal: the attention. What
# computes it takes all that follows. Shapes: see ``canonical.attention``.
Attention = Callable[[int, Callable[..., Tensor], Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


@dataclass(frozen=True)
class Observation:
    """What one attention layer did with one batch of text.

    site: its number, in order. shape: its heads. name: of its module. scale: of q . k. valid: bool ``[B, S]``, False
    for padding. tensors: what was asked for, by name: "queries", "output" ``[B, H, S, D]``, "keys", "values"
    ``[B, H_kv, S, D]``, as attention reads them; "plain_queries", "plain_keys", before rotary embedding.
    """

    site: int
    shape: SiteShape
    name: str
    scale: float
    valid: Tensor
    tensors: Mapping[str, Tensor] = field(repr=False)

    def tokens(self, name: str) -> Tensor:
        """One of ``tensors`` without padding: ``[n, H, D]``, n the tokens of all rows that are none."""
        return self.tensors[name].transpose(1, 2)[self.valid]


class Collector(Protocol):
    """Runs the model over the text, as often as it is asked to."""

    model: nn.Module
    batches: Sequence[Batch]
    sites: tuple[SiteShape, ...]

    def run(self, wanted: Sequence[Wanted], observe: Callable[[Observation], None]) -> None:
        """Show every layer's work on every batch, layer by layer: nothing that was shown is kept."""

    def replaced(self, attention: Attention) -> Callable[..., Any]:
        """The model without its head, in which ``attention`` stands in the place of every attention layer's."""

    def progress(self, steps: range) -> Iterator[int]:
        """``steps`` one by one, which whoever waits is told of."""


class Calibrator:
    """Makes the tensors of a method's plan; a method names its subclass in ``calibrator``.

    Most say what they want to see of every layer, add it up in ``observe`` and answer in ``finish``; one that trains
    overrides ``run``.
    """

    wanted: ClassVar[tuple[Wanted, ...]] = ()

    def __init__(self, options: Any, seed: int):
        """options: the method's, whose plan is None. seed: of whatever is random."""
        self.options = options
        self.seed = seed

    def run(self, collector: Collector) -> dict[str, Tensor]:
        """The tensors of the plan; the model's weights are what they were before, in the end."""
        collector.run(self.wanted, self.observe)
        return self.finish()

    def observe(self, seen: Observation) -> None:
        """Take note of one layer's work on one batch."""

    def finish(self) -> dict[str, Tensor]:
        """The tensors of the plan, by name."""
        raise NotImplementedError
