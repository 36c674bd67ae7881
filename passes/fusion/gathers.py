"""What takes the kept tokens of a tensor, and which of these nodes may run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torchaccel.kernels import registry
from torchaccel.kernels.gather_spec import GatherSpec, TokenItem

from torchaccel.graph.nodes import argument, arguments, dtype, hint, op_name, rank, same_size, sizes

from .aliases import source
from .legality import Legality


@dataclass(frozen=True, eq=False)
class TokenGather:
    """The tokens ``index`` of the tensor ``x``, as ``item`` says, in the place of ``output``."""

    x: Node
    index: Node
    item: TokenItem
    output: Node

    @property
    def elements(self) -> int:
        """Number of elements of the result, for the sizes that the graph was captured with."""
        return count(self.output)


@dataclass(frozen=True)
class GatherGroup:
    """Gathers by one index to run in one kernel; ``place`` is that of the first among all by this index."""

    gathers: tuple[TokenGather, ...]
    place: int

    @property
    def size(self) -> int:
        """Number of gathers."""
        return len(self.gathers)

    @property
    def spec(self) -> GatherSpec:
        """What the kernel does."""
        return GatherSpec(tuple(gather.item for gather in self.gathers))


def count(node: Node) -> int:
    """Number of elements of a tensor node, for the sizes that the graph was captured with."""
    total = 1
    for size in sizes(node):
        total *= hint(size) or 0
    return total


def find_gathers(graph: Graph) -> list[list[TokenGather]]:
    """The gathers of a graph by their index, in graph order; those along two dimensions are one."""
    found: dict[Node, TokenGather] = {}
    for node in graph.nodes:
        gather = _gather(node)
        if gather is None:
            continue
        rows = found.get(gather.x)
        if rows is not None and _is_square(rows, gather):
            del found[gather.x]
            gather = TokenGather(rows.x, rows.index, TokenItem(rows.item.dim, rows.item.width, True), node)
        found[node] = gather
    by_index: dict[Node, list[TokenGather]] = {}
    for gather in found.values():
        by_index.setdefault(gather.index, []).append(gather)
    return list(by_index.values())


def runs(gathers: Sequence[TokenGather]) -> Iterator[GatherGroup]:
    """Every run of two or more gathers, legal or not."""
    for start in range(len(gathers)):
        for end in range(start + 2, len(gathers) + 1):
            yield GatherGroup(tuple(gathers[start:end]), start)


def problem(group: GatherGroup, legality: Legality) -> str | None:
    """Why gathers may not run together, in one line; None when they may.

    All that is read must stand before all that is read of the group, unwritten, with as many tokens each, and a
    generated kernel must exist.
    """
    order = legality.order
    inputs = [group.gathers[0].index, *(gather.x for gather in group.gathers)]
    needed = max(order[node] for node in inputs)
    if any(order[user] <= needed for gather in group.gathers for user in gather.output.users):
        return "not schedulable"
    first = group.gathers[0]
    if not all(same_size(tokens(gather), tokens(first)) for gather in group.gathers):
        return "not uniform"
    if any(source(node) in legality.written for node in inputs):
        return "not pure"
    return registry.gather_problem(group.spec, legality.device)


def tokens(gather: TokenGather) -> Any:
    """How many tokens a gather chooses from."""
    return sizes(gather.x)[gather.item.dim]


def _gather(node: Node) -> TokenGather | None:
    """The gather of one node, ``take_along_dim(x, index[..], dim)``, whose tokens differ by batch row at most."""
    if op_name(node) != "take_along_dim":
        return None
    x, index, dim = argument(node, 0, "input"), argument(node, 1, "indices"), argument(node, 2, "dim")
    found = dtype(x)
    if not isinstance(x, Node) or found is None or not isinstance(dim, int) or dim < 0:
        return None
    if x.meta["example_value"].device.type != node.meta["example_value"].device.type:
        return None
    keep = _tokens(index, dim, rank(x) or 0)
    return None if keep is None else TokenGather(x, keep, TokenItem(dim, found.itemsize), node)


def _tokens(index: Any, dim: int, ndim: int) -> Node | None:
    """The int64 ``[B, K]`` behind an index that has K along ``dim``, B along the first dimension or none."""
    if op_name(index) != "getitem":
        return None
    keep, entries = arguments(index)
    if rank(keep) != 2 or dtype(keep) != torch.int64 or not isinstance(entries, tuple):
        return None
    batched: list[Any] = [None] * ndim
    batched[dim] = slice(None)
    single = (0, *batched)
    if dim:
        batched[0] = slice(None)
        if entries == tuple(batched):
            found: Node = keep
            return found
    batch = sizes(keep)[0]
    return keep if entries == single and isinstance(batch, int) and batch == 1 else None


def _is_square(rows: TokenGather, columns: TokenGather) -> bool:
    """Whether a gather takes the columns of what another has taken the rows of, which nobody else reads."""
    if rows.item.square or rows.index is not columns.index or columns.item.dim != rows.item.dim + 1:
        return False
    of = sizes(rows.x)
    return len(of) == columns.item.dim + 1 and same_size(of[-2], of[-1]) and len(rows.output.users) == 1
