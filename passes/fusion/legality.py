"""When atoms may become one kernel."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Graph, Node
from torchaccel.kernels import registry
from torchaccel.kernels.fused_spec import Linear, Norm, Rope, Slice

from torchaccel.graph.nodes import arguments, shape, writes_in_place

from .aliases import source
from .atoms import count, static_rows
from .groups import Group
from .specs import spec_of


class Legality:
    """The rules, for one graph as it is before anything is rewritten.

    A group is legal when it is
    - convex: no path leaves the group and comes back;
    - schedulable: whatever it reads stands before whatever reads it, so that it can run at one point of the program
      without anything else being moved;
    - pure: nothing it reads is written in place, and it writes nothing in place;
    - uniform: one dtype, static shapes, and all of its linear layers have the same number of rows, a divisor of every
      other value's elements; groups of columns (heads) lie within a row; tables and parameters come from outside;
    - supported: a generated kernel exists for its spec.
    It may have any number of results: every value that is read outside is returned, and listed in the spec.
    """

    def __init__(self, graph: Graph, device: str):
        self.device = device
        self.order: Mapping[Node, int] = {node: place for place, node in enumerate(graph.nodes)}
        self.written = {source(arguments(node)[0]) for node in graph.nodes if _writes(node)}

    def problem(self, group: Group) -> str | None:
        """Which rule a group breaks, in one line; None when it is legal."""
        if not group.results:
            return "nothing reads it"
        if not self._convex(group):
            return "not convex"
        if not self._schedulable(group):
            return "not schedulable"
        written = self.written.intersection((*group.inputs, *group.nodes))
        if written or any(map(writes_in_place, group.nodes)):
            return "not pure"
        if not _uniform(group):
            return "not uniform"
        return registry.fused_problem(spec_of(group), self.device)

    def _convex(self, group: Group) -> bool:
        # The program is in topological order: a path that comes back stays before the group's last node.
        last = max(self.order[node] for node in group.nodes)
        pending = list(group.readers)
        seen = set(pending)
        while pending:
            for user in pending.pop().users:
                if user in group.nodes:
                    return False
                if self.order[user] < last and user not in seen:
                    seen.add(user)
                    pending.append(user)
        return True

    def _schedulable(self, group: Group) -> bool:
        needed = max(self.order[node] for node in group.inputs)
        return all(self.order[reader] > needed for reader in group.readers)


def _writes(node: Node) -> bool:
    if not arguments(node) or not isinstance(arguments(node)[0], Node):
        return False
    return writes_in_place(node)


def _uniform(group: Group) -> bool:
    rows = {static_rows(atom.output) for atom in group.atoms if atom.kind is Linear}
    made = {atom.output for atom in group.atoms}
    if len(rows) != 1 or any(node in made for atom in group.atoms for node in {*atom.reads()} - {*atom.rows()}):
        return False
    (m,) = rows
    for atom in group.atoms:
        of = shape(atom.output) or ()
        if count(atom.output) % m or of == ():
            return False
        group_size = atom.facts.get("group", 1) if atom.kind in (Norm, Slice) else 1
        read = atom.values.get("x")
        if isinstance(read, Node) and (count(read) % m or count(read) // m % group_size):
            return False
        if atom.kind is Rope and not _rope_rows(atom.values["cos"], atom.output, m):
            return False
        if "groups" in atom.facts and atom.facts["groups"] % m:
            return False
    return True


def _rope_rows(table: object, output: Node, rows: int) -> bool:
    """Whether a table's rows are one for all rows of the kernel, or one for each of them."""
    of = shape(output) or (0,)
    if not isinstance(table, Node) or count(output) // rows % int(of[-1]):
        return False
    found = count(table) // int(of[-1])
    return found == 1 or (found == rows == of[0])
