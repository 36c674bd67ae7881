"""The backend: from a graph Dynamo captured to the callable that replaces it."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchaccel.cost.assumed import assumed_facts
from torchaccel.cost.facts import DeviceFacts
from torchaccel.errors import CacheMissError, CalibrationError, DeclinedError, OptionsError
from torchaccel.options import Options, resolve
from torchaccel.passes.base import Decline, Fidelity, PassResult, Reason, Status
from torchaccel.passes.canonicalize.half_precision import upcast_half
from torchaccel.passes.fusion.fuse_gathers import FuseGathers
from torchaccel.passes.fusion.fuse_rows import FuseRows
from torchaccel.passes.fusion.plan import Rates
from torchaccel.passes.lowering.attention import AttentionLowering
from torchaccel.passes.lowering.choice import Chooser
from torchaccel.passes.lowering.linear import lower_linear
from torchaccel.passes.lowering.lowered import Lowered
from torchaccel.passes.manager import PassManager
from torchaccel.reporting import GraphRecord, Journal
from torchaccel.runtime.compiled_graph import CompiledGraph, plain
from torchaccel.runtime.kv import LogicalKV
from torchaccel.tuning.deployment import Deployment
from torchaccel.tuning.picks import pick_kernels
from torchaccel.tuning.tasks import tasks_in
from torchaccel.tuning.tuned import Tuned


class Backend:
    """What ``torch.compile(model, backend="torchaccel")`` calls for every captured graph."""

    __name__ = "torchaccel"

    def __init__(self, journal: Journal, *, execute_only: bool = False):
        """journal: where the records go. execute_only: rewrite but do not compile (for ``explain``)."""
        self.journal = journal
        self.execute_only = execute_only
        self.deployment = Deployment()
        self.graphs_received = 0

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph. ``options``: see ``torchaccel.options``; ``mode``: an Inductor mode for what is around."""
        self.graphs_received += 1
        began = time.perf_counter()
        resolved = resolve(options)
        inputs = list(example_inputs)
        brought = self.deployment.bring(resolved.bundle, resolved.trust, _device(inputs), strict=resolved.strict)
        resolved = resolved.with_plans(brought.plans)
        record = GraphRecord("unknown", resolved.requested(), resolved.sources)
        record.graph_break = _graph_break(gm)
        self.journal.add(record, inputs)
        compile_rest = self._compiler(mode)
        record.declined = _unsuitable(inputs)
        with self.deployment.settings(brought):
            compiled = self._compile(gm, inputs, resolved, record, compile_rest)
        record.compile_seconds = time.perf_counter() - began
        return compiled

    def _compile(
        self,
        gm: GraphModule,
        inputs: list[Any],
        options: Options,
        record: GraphRecord,
        compile_rest: Callable[..., Any],
    ) -> Callable[..., Any]:
        """The accelerated graph, or the exact one with the reason in ``record``."""
        if record.declined is None:
            try:
                return self._accelerate(gm, inputs, options, record, compile_rest)
            except (OptionsError, CacheMissError, CalibrationError):
                raise
            except Exception as error:
                from torch._dynamo.exc import RestartAnalysis

                # With a restart Dynamo asks itself for another graph: its own business, not a failure.
                if options.strict or isinstance(error, RestartAnalysis):
                    raise
                record.declined = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"torchaccel could not rewrite the {record.phase} graph ({record.declined}); it runs through "
                    "Inductor, exactly. Set options={'strict': True} to get the error itself",
                    stacklevel=2,
                )
        return _exact(gm, inputs, compile_rest)

    def _accelerate(
        self,
        gm: GraphModule,
        inputs: list[Any],
        options: Options,
        record: GraphRecord,
        compile_rest: Callable[..., Any],
    ) -> Callable[..., Any]:
        module, lowered = self.rewrite(gm, inputs, options, record)
        if options.tune != "none" and not self.execute_only:
            tokens = max((t.shape[2] for t in inputs if isinstance(t, LogicalKV)), default=None)
            tasks = tasks_in(module.graph, tokens, lowered.compared)
            if self.deployment.tune(tasks, options.cache, options.tune, _device(inputs)):
                module, lowered = self.rewrite(gm, inputs, options, record)
        dense = _dense_examples(gm, inputs)
        examples = [dense[i] for i in lowered.bindings.arguments] + lowered.inputs
        compiled = compile_rest(module, examples)
        return CompiledGraph(compiled, lowered.bindings, record.counter)

    def rewrite(
        self, gm: GraphModule, inputs: list[Any], options: Options, record: GraphRecord
    ) -> tuple[GraphModule, Lowered]:
        """A rewritten copy of ``gm``, not compiled, and its signature; what was done goes into ``record``."""
        # Dynamo reads the original's placeholders again after the backend returns: work on a copy.
        module = GraphModule(gm, copy.deepcopy(gm.graph))
        device = _device(inputs)
        manager = PassManager(options.methods, strict=options.strict)
        parameters = [t for t in inputs if isinstance(t, torch.nn.Parameter)]
        label = f"graph{self.graphs_received:02d}"
        context, record.passes = manager.run(module, device, label, parameters)
        record.phase = context.anatomy.phase
        tuned = self._tuned(options, device)
        chooser = Chooser(device, self._facts(options, device), tuned)
        lowered = AttentionLowering(context, inputs, chooser, gate=options.gate, rotary=options.fusion).run()
        record.sites = lowered.sites
        _speak_of(lowered.declines, options.strict)
        if options.fusion:
            rates, record.groups = self._rates(options, device), []
            for fusion in (FuseRows(rates), FuseGathers(rates)):
                record.passes.append(manager.apply(fusion, context))
                record.groups += fusion.groups
        record.linear_layers = lower_linear(context.graph, device) + sum(group.linears for group in record.groups)
        record.picks = pick_kernels(context.graph, tuned, device.type)
        # Last, because the kernels above take float16 as it is and compute in float32 themselves.
        upcast_half(context.graph)
        record.passes.append(_lowering_result(lowered.declines, [site.site for site in lowered.sites]))
        context.graph.lint()
        module.recompile()
        module.meta = {}
        manager.dump(context.graph, label, 90, "lowered")
        return module, lowered

    def _tuned(self, options: Options, device: torch.device) -> Tuned:
        brought = self.deployment.bring(options.bundle, options.trust, device, strict=options.strict)
        return self.deployment.tuned(options.cache, brought, device)

    def _facts(self, options: Options, device: torch.device) -> DeviceFacts | None:
        return self.deployment.facts(options.cache, device) or assumed_facts(device)

    def _rates(self, options: Options, device: torch.device) -> Rates | None:
        if device.type != "cpu":
            return None  # on GPUs Inductor fuses well, and nothing of ours has been measured against it
        facts = self._facts(options, device)
        if facts is None:
            return Rates()
        return Rates(1e9 * facts.dram_gbs, 1e-6 * facts.launch_us, 1e-6 * facts.fork_us)

    def _compiler(self, mode: str | None) -> Callable[..., Any]:
        if self.execute_only:
            return lambda module, examples: module.forward
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode else {}
        return lambda module, examples: compile_fx(module, examples, config_patches=patches)


def _graph_break(gm: GraphModule) -> str | None:
    """Why Dynamo ended this graph before the end of the model, and where; None for a whole graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    where = f" ({reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno})" if reason.user_stack else ""
    return str(reason.reason).strip().splitlines()[0] + where


def _unsuitable(inputs: list[Any]) -> str | None:
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if not tensors:
        return "the graph has no tensor inputs"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are needed (call the model under torch.no_grad() for inference)"
    devices = {t.device for t in tensors if t.dim() > 0}
    if len(devices) > 1:
        return f"its inputs are on several devices ({', '.join(sorted(str(d) for d in devices))})"
    return None


def _exact(gm: GraphModule, inputs: list[Any], compile_rest: Callable[..., Any]) -> Callable[..., Any]:
    if not any(isinstance(t, LogicalKV) for t in inputs):
        compiled: Callable[..., Any] = compile_rest(gm, inputs)
        return compiled
    module = GraphModule(gm, copy.deepcopy(gm.graph))
    module.meta = {}
    compiled = compile_rest(module, _dense_examples(gm, inputs))
    return lambda *args: compiled(*[plain(arg) for arg in args])


def _dense_examples(gm: GraphModule, inputs: list[Any]) -> list[Any]:
    """The inputs, with the fake dense tensor (symbolic length and all) in place of each logical KV tensor."""
    nodes = gm.graph.find_nodes(op="placeholder")
    fakes = [node.meta.get("example_value") for node in nodes]
    return [
        fake.dense() if isinstance(fake, LogicalKV) else _by_present_name(value)
        for fake, value in zip(fakes, inputs, strict=True)
    ]


def _by_present_name(value: Any) -> Any:
    """A symbolic number under the symbol that stands for it now.

    Symbols that turned out to be equal are one, but Inductor binds an input to the one it was made with: with the
    logical KV tensors, which brought the other along, it would be gone.
    """
    if not isinstance(value, torch.SymInt) or not value.node.expr.is_Symbol or value.node._expr == value.node.expr:
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def _device(inputs: list[Any]) -> torch.device:
    return next((t.device for t in inputs if isinstance(t, Tensor) and t.dim() > 0), torch.device("cpu"))


# What was asked for and is not done, for reasons that only lowering knows.
SPOKEN = (Reason.SLOWER, Reason.PLAIN_CACHE, Reason.EVICTING_STEPS, Reason.MOVED_TOKENS)


def _speak_of(declines: list[Decline], strict: bool) -> None:
    """Say that what was asked for is not done for reasons that only lowering knows."""
    refused = [decline for decline in declines if decline.reason in SPOKEN]
    if not refused:
        return
    message = f"torchaccel left {len(refused)} site(s) exact; {refused[0]}"
    if strict:
        raise DeclinedError(message)
    warnings.warn(message, stacklevel=2)


def _lowering_result(declines: list[Decline], sites: list[str]) -> PassResult:
    status = Status.APPLIED if sites else Status.DECLINED if declines else Status.NO_MATCH
    return PassResult("lower_attention", Fidelity.EXACT, status, sites, declines)
