"""The pass that fuses what stands around few-row linear layers into single kernels; exact."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node
from torchaccel.kernels import ops, registry
from torchaccel.kernels.fused_spec import Linear

from torchaccel.graph.layers import module_path

from ..base import Fidelity, Pass, PassResult, RewriteContext
from ..dead_code import remove_dead_code
from .groups import Group
from .plan import Candidate, Chosen, R, Rates, plan
from .rewrite import rewrite_group
from .specs import spec_of


@dataclass(frozen=True)
class FusedGroup:
    """A group that runs as one kernel: what it does, where, and what that is predicted to save per call.

    lost: the best alternatives, each with its predicted microseconds saved, best first.
    """

    kernel: str
    site: str
    linears: int
    saved_bytes: int
    saved_launches: int
    saved_microseconds: float
    lost: tuple[tuple[str, float], ...]


class FuseRows(Pass):
    """Groups norms, linear layers, activations, residuals and rotary embeddings of a few rows into kernels."""

    name = "fuse_rows"
    fidelity = Fidelity.EXACT

    def __init__(self, rates: Rates | None):
        """rates: what the machine charges; they decide what is fused. None where nobody knows: nothing is."""
        self.rates = rates
        self.groups: list[FusedGroup] = []

    def apply(self, context: RewriteContext) -> PassResult:
        """Fuse every group that is predicted to save time, in place."""
        self.groups = []
        if self.rates is None:
            return self.result(
                [], [], f"nothing measured on {context.device.type} says that it beats Inductor's fusion"
            )
        ops.library()
        replaced: dict[Node, Node] = {}
        done: list[FusedGroup] = []
        for chosen in plan(context.graph, context.device.type, self.rates):
            if not context.fuel.take():
                break
            spec = spec_of(chosen.candidate.group)
            # A compiler that fails must do so here, where the graph can still be restored.
            registry.fused(spec, context.device.type)
            rewrite_group(context.graph, chosen.candidate.group, spec, replaced)
            done.append(_described(chosen))
        remove_dead_code(context.graph)
        self.groups = done
        return self.result([group.site for group in done], [])


def describe(group: Group) -> str:
    """A group's steps in order, such as "2 linear, add, norm"; what follows one another is counted."""
    parts: list[tuple[str, int]] = []
    for atom in group.atoms:
        name = str(atom.facts.get("function", atom.kind.__name__)).lower()
        if parts and parts[-1][0] == name:
            parts[-1] = (name, parts[-1][1] + 1)
        else:
            parts.append((name, 1))
    return ", ".join(name if times == 1 else f"{times} {name}" for name, times in parts)


def _described(chosen: Chosen[Group]) -> FusedGroup:
    candidate = chosen.candidate
    return FusedGroup(
        kernel=describe(candidate.group),
        site=_site(candidate.group),
        linears=candidate.group.linears,
        saved_bytes=candidate.saved_bytes,
        saved_launches=candidate.saved_launches,
        saved_microseconds=microseconds(candidate),
        lost=tuple((describe(other.group), microseconds(other)) for other in chosen.lost),
    )


def microseconds(candidate: Candidate[R]) -> float:
    """What a candidate is predicted to save, for a report."""
    return round(1e6 * candidate.saved_seconds, 2)


def _site(group: Group) -> str:
    """The modules a group reaches from and to."""
    paths = [(module_path(atom.output) or [atom.output.name])[-1] for atom in group.atoms if atom.kind is Linear]
    return paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
