"""Runs a model over text and shows what its attention layers do, layer by layer, in bounded memory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from torchaccel.errors import CalibrationError
from torchaccel.graph import canonical
from torchaccel.graph.anatomy import AttentionSite, analyze
from torchaccel.graph.rotary import rotation_of
from torchaccel.passes.canonicalize.attention import canonicalize_attention
from torchaccel.passes.dead_code import remove_dead_code

from .calibrator import Attention, Batch, Observation, Wanted
from .identity import SiteShape

Report = Callable[[int, int], None]
# Tokens of the prompt that tells which attention layers a model has.
PROBE = 8


class TextCollector:
    """A ``Collector`` over batches of token ids; what it shows is read off the graph that Dynamo captures.

    Layers are numbered as the compiler numbers them, whatever the model's modules are called.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], report: Report | None = None):
        """batches: keyword arguments of the model. report: told how many steps of how many are done."""
        self.model = model
        self.batches = batches
        self.report = report
        self.sites: tuple[SiteShape, ...] = self._probe()

    def run(self, wanted: Sequence[Wanted], observe: Callable[[Observation], None]) -> None:
        """As of ``Collector``: gradients are off, and the model's results are thrown away."""
        graphs = [0]

        def record(gm: GraphModule, examples: list[Any]) -> Any:
            return _recording(gm, wanted, observe, graphs)

        compiled = torch.compile(self.model.forward, backend=record)
        with torch.no_grad():
            for step in self.progress(range(len(self.batches))):
                graphs[0] = 0
                compiled(**self._arguments(self.batches[step]))

    def replaced(self, attention: Attention) -> Callable[..., Any]:
        """As of ``Collector``: gradients flow, and a model with a cache has none."""
        body = getattr(self.model, "base_model", self.model)
        ran = [0]

        def rewrite(gm: GraphModule, examples: list[Any]) -> Any:
            return _replacing(gm, attention, ran)

        compiled = torch.compile(body.forward, backend=rewrite)
        uncached = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}

        def forward(**arguments: Any) -> Any:
            ran[0] = 0
            return compiled(**uncached, **arguments)

        return forward

    def progress(self, steps: range) -> Iterator[int]:
        """As of ``Collector``."""
        for done, step in enumerate(steps):
            if self.report is not None:
                self.report(done, len(steps))
            yield step

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        # Logits of every token of a window are larger than everything else together, and nobody reads them.
        fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        return {**fewer, **batch}

    def _probe(self) -> tuple[SiteShape, ...]:
        found: list[SiteShape] = []

        def look(gm: GraphModule, examples: list[Any]) -> Any:
            graph = copy.deepcopy(gm.graph)
            remove_dead_code(graph)
            canonicalize_attention(graph)
            found.extend(site_shape(site) for site in analyze(graph).attentions)
            return gm.forward

        short = {name: _cut(value) for name, value in self.batches[0].items()}
        with torch.no_grad():
            torch.compile(self.model.forward, backend=look)(**self._arguments(short))
        if not found:
            raise CalibrationError(
                f"no attention was found in {type(self.model).__name__}; torchaccel.explain(model, ids) says what is "
                "seen of a model"
            )
        return tuple(found)


def site_shape(site: AttentionSite) -> SiteShape:
    """The heads of an attention site."""
    return SiteShape(site.heads, site.kv_heads, site.head_dim)


def _cut(value: Any) -> Any:
    return value[:, :PROBE] if isinstance(value, Tensor) and value.dim() > 1 else value


def _replacing(gm: GraphModule, attention: Attention, ran: list[int]) -> Callable[..., Any]:
    """The graph with ``attention`` in the place of its own; ran[0]: attentions that ran before this graph."""
    module = GraphModule(gm, copy.deepcopy(gm.graph))
    graph = module.graph
    remove_dead_code(graph)
    canonicalize_attention(graph)
    sites = analyze(graph).attentions
    for site in sites:
        _replace(site, attention, ran)
    graph.lint()
    module.recompile()

    def run(*args: Any) -> Any:
        results = module.forward(*args)
        ran[0] += len(sites)
        return results

    return run


def _replace(site: AttentionSite, attention: Attention, ran: list[int]) -> None:
    def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return canonical.attention(q, k, v, mask, scale=site.scale, causal=causal, softcap=site.softcap)

    def replacement(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(ran[0] + site.index, own, q, k, v, mask, site.causal)

    graph = site.node.graph
    with graph.inserting_before(site.node):
        node = graph.call_function(replacement, (site.q, site.k, site.v, site.mask))
    site.node.replace_all_uses_with(node)
    graph.erase_node(site.node)


def _recording(
    gm: GraphModule, wanted: Sequence[Wanted], observe: Callable[[Observation], None], graphs: list[int]
) -> Callable[..., Any]:
    """The graph with a call of ``observe`` behind every attention; graphs[0]: attentions that ran before this graph."""
    module = GraphModule(gm, copy.deepcopy(gm.graph))
    graph = module.graph
    remove_dead_code(graph)
    canonicalize_attention(graph)
    sites = analyze(graph).attentions
    for site in sites:
        _insert(graph, site, wanted, observe, graphs)
    graph.lint()
    module.recompile()
    own = len(sites)

    def run(*args: Any) -> Any:
        results = module.forward(*args)
        graphs[0] += own
        return results

    return run


def _insert(
    graph: Graph,
    site: AttentionSite,
    wanted: Sequence[Wanted],
    observe: Callable[[Observation], None],
    graphs: list[int],
) -> None:
    def show(mask: Tensor | None, keys: Tensor, *tensors: Tensor) -> None:
        seen: dict[str, Tensor] = dict(zip(wanted, tensors, strict=True))
        shape = site_shape(site)
        observe(Observation(graphs[0] + site.index, shape, site.name, float(site.scale), _valid(mask, keys), seen))

    with graph.inserting_after(site.node):
        nodes = [_node(site, name) for name in wanted]
        graph.call_function(show, (site.mask, site.key_cache.new, *nodes))


def _node(site: AttentionSite, wanted: Wanted) -> Node:
    """The node that computes one of the things a calibrator may ask for."""
    if wanted == "output":
        return site.node
    if wanted == "values":
        return site.value_cache.new
    source = site.q if wanted.endswith("queries") else site.key_cache.new
    rotation = rotation_of(source) if wanted.startswith("plain") else None
    return source if rotation is None else rotation.x


def _valid(mask: Tensor | None, keys: Tensor) -> Tensor:
    """Which tokens are no padding, bool ``[B, S]``: those that see themselves (a window may hide all the others)."""
    batch, _, tokens, _ = keys.shape
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=keys.device)
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    own = allowed[:, 0, :, -tokens:]
    return own.expand(batch, tokens, tokens).diagonal(dim1=1, dim2=2)
