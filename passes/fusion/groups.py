"""Enumerates what may run together: runs of atoms between the operators that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from torch.fx import Graph, Node
from torchaccel.kernels.fused_spec import Linear

from .aliases import is_alias, is_parts
from .atoms import Atom, find_atoms

# Runs of a chain are of quadratic number; the longest chain seen between two attentions has 22 atoms.
MAX_CHAIN = 64


@dataclass(frozen=True)
class Group:
    """Atoms to run in one kernel, in graph order; ``place`` and ``size`` are their run within their chain.

    results: for every value that is read outside of the group, itself and the views of it that are read there.
    readers: who reads them.
    """

    atoms: tuple[Atom, ...]
    place: int
    results: dict[Node, tuple[Node, ...]]
    readers: frozenset[Node]

    @property
    def size(self) -> int:
        """Number of atoms."""
        return len(self.atoms)

    @cached_property
    def nodes(self) -> frozenset[Node]:
        """Every node the group replaces."""
        return frozenset(node for atom in self.atoms for node in atom.nodes)

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """What the group reads and does not compute, each once."""
        made = {atom.output for atom in self.atoms}
        return tuple(dict.fromkeys(node for atom in self.atoms for node in atom.reads() if node not in made))

    @property
    def linears(self) -> int:
        """Number of linear layers."""
        return sum(atom.kind is Linear for atom in self.atoms)


def chains(graph: Graph) -> list[list[Atom]]:
    """The atoms of a graph, split into chains: connected, with a linear layer, and no path leaves one and comes back.

    Atoms are in one chain only where as many other operators follow one another on the way to them, counting from the
    first linear layer: between two attentions, that is.
    """
    atoms = find_atoms(graph)
    levels = _levels(graph, {atom.output: atom for atom in atoms})
    joined = nx.Graph()
    makers = {atom.output: atom for atom in atoms}
    for atom in atoms:
        joined.add_node(atom)
        for node in atom.rows():
            if node in makers and levels[node] == levels[atom.output]:
                joined.add_edge(makers[node], atom)
    order = {atom: place for place, atom in enumerate(atoms)}
    found = [sorted(part, key=order.__getitem__) for part in nx.connected_components(joined)]
    kept = [part for part in found if any(atom.kind is Linear for atom in part) and len(part) <= MAX_CHAIN]
    return sorted(kept, key=lambda part: order[part[0]])


def runs(chain: Sequence[Atom]) -> Iterator[Group]:
    """Every run of two or more atoms of a chain with a linear layer among them, legal or not."""
    makers = {atom.output for atom in chain}
    seen = {node: _seen_through_views(node) for node in makers}
    for start in range(len(chain)):
        for end in range(start + 2, len(chain) + 1):
            members = tuple(chain[start:end])
            if any(atom.kind is Linear for atom in members):
                inside = frozenset(node for atom in members for node in atom.nodes)
                results: dict[Node, tuple[Node, ...]] = {}
                readers: set[Node] = set()
                for atom in members:
                    outside = {view: users - inside for view, users in seen[atom.output].items()}
                    found = tuple(view for view, users in outside.items() if users)
                    readers.update(*outside.values())
                    if found:
                        results[atom.output] = found
                yield Group(members, start, results, frozenset(readers))


def _levels(graph: Graph, atoms: dict[Node, Atom]) -> dict[Node, int]:
    """For every node, how many operators that are no atoms follow one another on the way to it from a linear layer."""
    levels: dict[Node, int] = {}
    after: set[Node] = set()
    for node in graph.nodes:
        atom = atoms.get(node)
        sources = atom.reads() if atom else node.all_input_nodes
        levels[node] = max((levels[source] for source in sources), default=0)
        if any(source in after for source in sources):
            after.add(node)
            levels[node] += atom is None and not is_alias(node) and not is_parts(node)
        if atom and atom.kind is Linear:
            after.add(node)
    return levels


def _seen_through_views(node: Node) -> dict[Node, set[Node]]:
    """A node and the views of it -> who reads each, views excepted; the parts of a split read what is split."""
    found: dict[Node, set[Node]] = {}
    pending = [node]
    while pending:
        seen = pending.pop()
        found[seen] = set()
        for user in seen.users:
            if is_alias(user):
                pending.append(user)
            else:
                found[seen].update(user.users if is_parts(user) else (user,))
    return found
