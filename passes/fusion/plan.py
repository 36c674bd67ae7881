"""Which groups to fuse: every chain is cut into runs so that the predicted time saved is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import networkx as nx
from torch.fx import Graph, Node
from torchaccel.kernels.fused_spec import Linear

from .atoms import Atom, count, element_bytes
from .groups import Group, chains, runs
from .legality import Legality

# How many of the best runs that were not taken a report shows for each that was.
SHOWN = 3


@dataclass(frozen=True)
class Rates:
    """What a machine charges, for the score of a group.

    bytes_per_second: of memory. operator_seconds: a kernel called as an operator from a compiled graph. fork_seconds:
    the threads of a kernel waking, or meeting between two of its layers. loop_seconds: a loop that Inductor generates.
    scattered_seconds: what an element costs more in such a loop than in a kernel of ours, for all threads together,
    where both its row and its column are looked up; 0 while nobody has measured it.
    The other defaults were measured on two cores of an EPYC 9005 (torch 2.13): 45 GB/s, 13 us, 2 us, 4 us.
    """

    bytes_per_second: float = 45e9
    operator_seconds: float = 13e-6
    fork_seconds: float = 2e-6
    loop_seconds: float = 4e-6
    scattered_seconds: float = 0.0


class Run(Protocol):
    """What stands at ``place .. place + size`` of a sequence of which runs are taken."""

    @property
    def place(self) -> int: ...
    @property
    def size(self) -> int: ...


R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Candidate(Generic[R]):
    """A legal group and what it is predicted to save: bytes of memory, launches, seconds."""

    group: R
    saved_bytes: int
    saved_launches: int
    saved_seconds: float


@dataclass(frozen=True)
class Chosen(Generic[R]):
    """A candidate that was taken, and the best of those that lost to it, best first."""

    candidate: Candidate[R]
    lost: tuple[Candidate[R], ...]


def plan(graph: Graph, device: str, rates: Rates) -> list[Chosen[Group]]:
    """The groups to fuse, in graph order.

    The runs taken of a chain do not overlap, so dynamic programming over the chain finds the best choice, exactly; what
    is in no run stays with Inductor and the few-row linear kernel. Runs that save nothing are not taken.
    """
    legality = Legality(graph, device)
    found: list[Chosen[Group]] = []
    for chain in chains(graph):
        options = [score(run, chain, rates) for run in runs(chain) if legality.problem(run) is None]
        found += best_runs(len(chain), [option for option in options if option.saved_seconds > 0])
    return found


def score(group: Group, chain: Sequence[Atom], rates: Rates) -> Candidate[Group]:
    """What a group saves against its atoms run as they are without it.

    Without it, linear layers of one input are one operator, and neighbours among the rest of a chain one loop. Values
    that nobody outside reads are neither written nor read; others are read once less.
    """
    members = set(group.atoms)
    projected = {atom.values["x"] for atom in group.atoms if atom.kind is Linear}
    loops = [loop for loop in _loops(chain) if loop <= members]
    moved = 0
    read_inside = {node for atom in group.atoms for node in atom.reads()}
    for atom in group.atoms:
        size = count(atom.output) * element_bytes(atom.output)
        # A value between two parts of one loop is in registers anyway.
        stored = atom.kind is Linear or (atom.output not in group.results and _leaves_loop(atom, loops))
        if stored and atom.output in read_inside:
            moved += size if atom.output in group.results else 2 * size
    launches = len(projected) + len(loops) - 1
    before = len(projected) * (rates.operator_seconds + rates.fork_seconds) + len(loops) * rates.loop_seconds
    after = rates.operator_seconds + _depth(group) * rates.fork_seconds
    return Candidate(group, moved, launches, moved / rates.bytes_per_second + before - after)


def best_runs(length: int, options: list[Candidate[R]]) -> list[Chosen[R]]:
    """The choice of runs of ``length`` things with the largest sum, and for each what lost to it."""
    best: list[tuple[float, tuple[Candidate[R], ...]]] = [(0.0, ())]
    for end in range(1, length + 1):
        found = best[end - 1]
        for option in options:
            if option.group.place + option.group.size == end:
                seconds, before = best[option.group.place]
                if seconds + option.saved_seconds > found[0]:
                    found = (seconds + option.saved_seconds, (*before, option))
        best.append(found)
    taken = best[length][1]
    ranked = sorted((o for o in options if o not in taken), key=lambda option: -option.saved_seconds)
    return [Chosen(one, tuple([o for o in ranked if _overlap(o, one)][:SHOWN])) for one in taken]


def _overlap(a: Candidate[R], b: Candidate[R]) -> bool:
    return a.group.place < b.group.place + b.group.size and b.group.place < a.group.place + a.group.size


def _loops(chain: Sequence[Atom]) -> list[frozenset[Atom]]:
    """What Inductor would make one loop each: connected atoms that are no linear layers."""
    makers = {atom.output: atom for atom in chain if atom.kind is not Linear}
    joined = nx.Graph()
    joined.add_nodes_from(makers.values())
    for atom in makers.values():
        joined.add_edges_from((makers[node], atom) for node in atom.reads() if node in makers)
    return [frozenset(part) for part in nx.connected_components(joined)]


def _leaves_loop(atom: Atom, loops: list[frozenset[Atom]]) -> bool:
    """Whether a reader of an atom's result is outside of the atom's loop."""
    own = next((loop for loop in loops if atom in loop), frozenset({atom}))
    inside: set[Node] = {node for other in own for node in other.nodes}
    return any(user not in inside for user in atom.output.users)


def _depth(group: Group) -> int:
    """Barriers of a group's kernel: linear layers that follow one another."""
    depth: dict[Node, int] = {}
    for atom in group.atoms:
        before = max((depth.get(node, 0) for node in atom.reads()), default=0)
        depth[atom.output] = before + (atom.kind is Linear)
    return max(depth.values())
