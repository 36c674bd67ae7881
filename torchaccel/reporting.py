"""What happened to a model: every graph that was compiled for it, what fired where, what declined and why."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.weak import WeakTensorKeyDictionary

from torchaccel.methods import FAMILIES
from torchaccel.passes.base import Fidelity, PassResult, Status
from torchaccel.passes.fusion.fuse_rows import FusedGroup
from torchaccel.passes.lowering.lowered import LoweredSite
from torchaccel.runtime.call_counter import CallCounter, LayerBytes


@dataclass
class GraphRecord:
    """One captured graph: how it was rewritten and compiled, and how often it ran.

    picks: kernels other than attention that do not run their seed, since tuning found a faster candidate.
    """

    phase: str
    requested: dict[str, Any]
    sources: dict[str, str]
    passes: list[PassResult] = field(default_factory=list)
    sites: list[LoweredSite] = field(default_factory=list)
    linear_layers: int = 0
    groups: list[FusedGroup] = field(default_factory=list)
    picks: list[str] = field(default_factory=list)
    declined: str | None = None
    graph_break: str | None = None
    compile_seconds: float = 0.0
    counter: CallCounter = field(default_factory=CallCounter)


@dataclass
class Report:
    """The records of one model's compilations, in the order they happened."""

    records: list[GraphRecord]

    @property
    def graphs(self) -> int:
        """Number of graphs compiled."""
        return len(self.records)

    @property
    def recompiles(self) -> int:
        """Graphs beyond the first of each phase and set of options."""
        return len(self.records) - len({(r.phase, repr(r.requested)) for r in self.records})

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling, in seconds."""
        return sum(r.compile_seconds for r in self.records)

    @property
    def requested(self) -> dict[str, Any]:
        """The options of the last compilation, as given."""
        return self.records[-1].requested if self.records else {}

    @property
    def effective(self) -> dict[str, Any]:
        """Per method: the phases in which it was applied and the number of sites."""
        found: dict[str, Any] = {}
        for record in self.records:
            for result in record.passes:
                if result.status is Status.APPLIED and result.fidelity is Fidelity.APPROX:
                    found.setdefault(result.name, {})[record.phase] = len(result.sites)
        return found

    @property
    def density(self) -> float | None:
        """Part of the pairs that the last sparse prompt (of its causal ones) or encoder read, the mean of its sites.

        None without such sites.
        """
        found = [record.counter.shares for record in self.records if record.counter.shares]
        return None if not found else float(torch.stack(found[-1]).mean())

    @property
    def declines(self) -> list[str]:
        """Everything that was asked for and not done, with its reason."""
        lines = [f"{r.phase}: {r.declined}" for r in self.records if r.declined]
        lines += [f"{r.phase}: the graph ends at a break: {r.graph_break}" for r in self.records if r.graph_break]
        lines += [f"{r.phase}: shared prefix: {reason}" for r in self.records for reason in sorted(r.counter.unshared)]
        lines += [f"{r.phase}: {p.name}: {d}" for r in self.records for p in r.passes for d in p.declines]
        return list(dict.fromkeys(lines))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "graphs": self.graphs,
            "recompiles": self.recompiles,
            "compile_seconds": round(self.compile_seconds, 3),
            "requested": self.requested,
            "effective": self.effective,
            "declines": self.declines,
            "records": [
                {
                    "phase": r.phase,
                    "requested": r.requested,
                    "sources": r.sources,
                    "declined": r.declined,
                    "graph_break": r.graph_break,
                    "kv_bytes": r.counter.kv_bytes,
                    "host_bytes": r.counter.host_bytes,
                    "file_bytes": r.counter.file_bytes,
                    "layers": [asdict(layer) for layer in r.counter.layers],
                    "density": [round(float(share), 4) for share in r.counter.shares],
                    "compile_seconds": round(r.compile_seconds, 3),
                    "calls": r.counter.calls,
                    "milliseconds": round(1e3 * r.counter.seconds, 3),
                    "linear_layers": r.linear_layers,
                    "groups": [asdict(group) for group in r.groups],
                    "picks": r.picks,
                    "passes": [
                        {
                            "name": p.name,
                            "fidelity": p.fidelity.value,
                            "status": p.status.value,
                            "sites": p.sites,
                            "declines": [str(d) for d in p.declines],
                            "detail": p.detail,
                        }
                        for p in r.passes
                    ],
                    "sites": [vars(s) for s in r.sites],
                }
                for r in self.records
            ],
        }

    def __str__(self) -> str:
        if not self.records:
            return (
                "torchaccel compiled nothing for this model. Call it at least once after "
                "model.compile(backend='torchaccel'); torch.compile(model) alone does not reach model.generate()"
            )
        stream = io.StringIO()
        console = Console(file=stream, width=120, emoji=False)
        console.print(
            f"torchaccel: {self.graphs} graphs, {self.recompiles} recompiles, {self.compile_seconds:.1f} s compiling"
        )
        console.print(self._requested_table())
        console.print(self._graph_table())
        cached = [record for record in self.records if record.counter.layers]
        if cached:
            console.print(_layer_table(cached[-1]))
        for record in self.records:
            if record.groups:
                console.print(_fusion_table(record))
            if record.picks:
                console.print(f"tuned  {record.phase}: {_counted(record.picks)}", highlight=False)
        for line in self.declines:
            console.print(f"declined  {line}", highlight=False)
        return stream.getvalue()

    def _requested_table(self) -> Table:
        table = Table("option", "requested", "from", "effective", title="requested and effective")
        last = self.records[-1]
        asked = [
            (key, one)
            for key, value in self.requested.items()
            for one in (value if isinstance(value, list) else [value])
        ]
        for key, value in asked:
            if key not in FAMILIES:
                table.add_row(key, str(value), last.sources.get(key, "default"), str(value))
                continue
            done = self.effective.get(value["method"])
            shown = "not applied" if done is None else ", ".join(f"{phase}: {n} sites" for phase, n in done.items())
            table.add_row(key, str(value), last.sources.get(key, "default"), shown)
        if not self.requested:
            table.add_row("(none)", "exact", "default", "exact")
        return table

    def _graph_table(self) -> Table:
        table = Table(
            "graph", "attention kernels", "cache", "KV MB", "linears", "calls", "ms/call", "compile s", title="graphs"
        )
        for record in self.records:
            kernels = _counted([_attention(site) for site in record.sites])
            aside = record.counter.host_bytes
            mean = 1e3 * record.counter.seconds / record.counter.calls if record.counter.calls else 0.0
            table.add_row(
                record.phase,
                kernels or (record.declined and "inductor") or "-",
                _counted([s.layout for s in record.sites]) or "-",
                _megabytes(record.counter.kv_bytes, record.counter.file_bytes)
                + (f" ({aside / 1e6:.2f} in host memory)" if aside else ""),
                str(record.linear_layers),
                str(record.counter.calls),
                f"{mean:.2f}",
                f"{record.compile_seconds:.1f}",
            )
        return table


class Journal:
    """Remembers, weakly, which graphs were compiled for which parameters.

    It is the one thing shared by all compilations of a process, and nothing but ``report`` reads it.
    """

    def __init__(self) -> None:
        self.by_parameter: Any = WeakTensorKeyDictionary()

    def add(self, record: GraphRecord, inputs: list[Any]) -> None:
        """File a record under every parameter among the graph's inputs."""
        for value in inputs:
            if isinstance(value, torch.nn.Parameter):
                self.by_parameter.setdefault(value, []).append(record)

    def of(self, model: torch.nn.Module) -> Report:
        """The report of a model, and of what else shares its parameters."""
        found: dict[int, GraphRecord] = {}
        for parameter in model.parameters():
            for record in self.by_parameter.get(parameter, []):
                found.setdefault(id(record), record)
        return Report(list(found.values()))


def _attention(site: LoweredSite) -> str:
    """The kernel of a site and what it does besides attending to everything, such as "cpp rotary window 64+4"."""
    window = f" window {site.window}+{site.sinks}" if site.window else ""
    sparse = f" {site.selector} from {site.sparse_from} tokens" if site.selector else ""
    return site.kernel + (" rotary" if site.rotary else "") + window + sparse


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _fusion_table(record: GraphRecord) -> Table:
    """The fused groups of a graph, equal ones in one row, each with the best alternatives that lost to it."""
    columns = "fused group", "groups", "KB saved", "launches saved", "us saved", "lost to it (us saved)"
    table = Table(*columns, title=f"fusion, {record.phase} (predicted, per group)")
    alike: dict[tuple[Any, ...], list[FusedGroup]] = {}
    for group in record.groups:
        alike.setdefault((group.kernel, group.saved_bytes, group.lost), []).append(group)
    for members in alike.values():
        first = members[0]
        table.add_row(
            f"{first.kernel}\n{first.site}",
            str(len(members)),
            f"{first.saved_bytes / 1e3:.1f}",
            str(first.saved_launches),
            f"{first.saved_microseconds:.1f}",
            "\n".join(f"{kernel} ({saved:.1f})" for kernel, saved in first.lost) or "-",
        )
    return table


def _layer_table(record: GraphRecord) -> Table:
    """The KV bytes of each layer, layers of equal ones in one row."""
    table = Table("layers", "KV MB", "plain tensors, MB", "of them", title=f"KV cache, {record.phase}")
    alike: dict[LayerBytes, list[int]] = {}
    for index, layer in enumerate(record.counter.layers):
        alike.setdefault(layer, []).append(index)
    for layer, members in alike.items():
        share = f"{layer.stored / layer.plain:.2f}" if layer.plain else "-"
        table.add_row(_ranges(members), f"{layer.stored / 1e6:.3f}", f"{layer.plain / 1e6:.3f}", share)
    return table


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, such as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _megabytes(memory: int, files: int) -> str:
    return f"{memory / 1e6:.2f}" + (f" + {files / 1e6:.2f} in files" if files else "")
