"""Puts what a cache of latents needs into a graph: latents of new tokens, projections, the rotary table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torchaccel.kernels.spec import KVFormat

from torchaccel.graph.anatomy import AttentionSite
from torchaccel.graph.nodes import op_name
from torchaccel.graph.propagate import annotate, fake_mode
from torchaccel.graph.rotary import Rotation, rotation_of
from torchaccel.runtime.bindings import LatentBinding
from torchaccel.runtime.factors import Factors
from torchaccel.runtime.layout import Layout

from ..base import Decline, Reason
from .signature import Signature


def key_rotation(site: AttentionSite) -> Rotation | Decline | None:
    """The rotary embedding of a site's new keys, None where they have none, or why it cannot be done later."""
    found = rotation_of(site.key_cache.new)
    if found is not None and found.style != "half":
        return Decline(site.name, Reason.NO_TABLE, f"channels are turned in pairs of the style {found.style!r}")
    if found is None and _is_turned(site.key_cache.new):
        return Decline(site.name, Reason.NO_TABLE)
    return found


def _tables(rotation: Rotation) -> tuple[Node, Node]:
    """Cosine and sine ``[B | 1, .., S, R]`` before every layer gave them a dimension for the heads."""

    def base(node: Node) -> Node:
        while op_name(node) == "unsqueeze" or (op_name(node) == "getitem" and _only_widens(node.args[1])):
            node = node.args[0]  # type: ignore[assignment]
        return node

    return base(rotation.cos), base(rotation.sin)


def _only_widens(index: Any) -> bool:
    return isinstance(index, tuple) and all(part is None or part == slice(None) for part in index)


def _is_turned(keys: Node) -> bool:
    """Whether keys are computed as rotary embeddings are, by sums of products, in a way that is not known."""
    node = keys
    while op_name(node) in ("to", "type_as", "contiguous", "transpose", "permute"):
        node = node.args[0]  # type: ignore[assignment]
    return op_name(node) in ("add", "cat", "view_as_real", "flatten")


@dataclass
class LatentLowering:
    """Adds nodes to one graph; constants are buffers of its module, each once."""

    graph: Graph
    module: torch.nn.Module
    signature: Signature

    def __post_init__(self) -> None:
        self._tables: dict[tuple[Node, Node], Node] = {}
        self._constants: dict[str, Node] = {}

    def store(self, site: AttentionSite, layouts: tuple[Layout, Layout]) -> LatentBinding:
        """Make the latents of a prompt, and its rotary table, results of the graph."""
        of_keys, of_values = (layout.factors for layout in layouts)
        keys, values = site.key_cache.new, site.value_cache.new
        with self.graph.inserting_before(self.graph.output_node()):
            rotation = rotation_of(keys) if of_keys and of_keys.rotary else None
            outputs = [
                None if factors is None else self.signature.extra_output(self._latents(x, factors, layout.format))
                for x, factors, layout in (
                    (keys if rotation is None else rotation.x, of_keys, layouts[0]),
                    (values, of_values, layouts[1]),
                )
            ]
        cos, sin = _tables(rotation) if rotation else (None, None)
        table = (self.signature.extra_output(cos), self.signature.extra_output(sin)) if cos and sin else None
        return LatentBinding(outputs[0], outputs[1], table)

    def tokens(self, site: AttentionSite, layouts: tuple[Layout, Layout]) -> tuple[Node, Node]:
        """New keys and values as they are appended, latents behind them."""
        keys, values = site.key_cache.new, site.value_cache.new
        rotation = rotation_of(keys) if layouts[0].turned else None
        plain = keys if rotation is None else rotation.x
        with self.graph.inserting_before(site.node):
            return self._wide(keys, plain, layouts[0]), self._wide(values, values, layouts[1])

    def rebuilding(
        self, site: AttentionSite, layouts: tuple[Layout, Layout], lens: Node
    ) -> tuple[tuple[Node | None, Node | None, Node | None], bool]:
        """Projection of keys, rotary table, projection of values; and whether the table is new among the inputs."""
        of_keys, of_values = (layout.factors for layout in layouts)
        past, first, table = site.key_cache.past, False, None
        rotation = rotation_of(site.key_cache.new) if layouts[0].turned else None
        if rotation is not None:
            assert past is not None
            cos, sin = _tables(rotation)
            table = self._tables.get((cos, sin))
            first = table is None
            if table is None:
                table = self.signature.buffer(past, layouts[0], "table")
                self._tables[cos, sin] = table
        with self.graph.inserting_before(site.node):
            projections = [
                None if factors is None else self._constant(f"{factors.digest}_projection", factors.projection)
                for factors in (of_keys, of_values)
            ]
            if first and rotation is not None:
                self.graph.call_function(torch.ops.torchaccel.extend_rotary.default, (table, cos, sin, lens))
        return (projections[0], table, projections[1]), first

    def _wide(self, x: Node, plain: Node, layout: Layout) -> Node:
        if layout.factors is None:
            return x
        parts = [x, self._latents(plain, layout.factors, layout.format)]
        return annotate(self.graph.call_function(torch.cat, (parts, -1)))

    def _latents(self, x: Node, factors: Factors, fmt: KVFormat) -> Node:
        """The latents ``[B, H, Q, rank]`` of tokens x ``[B, H, Q, D]``."""
        basis = self._constant(f"{factors.digest}_basis", factors.basis)
        call = self.graph.call_method
        side = annotate(call("flatten", (annotate(call("transpose", (x, 1, 2))), 2)))
        made = annotate(self.graph.call_function(torch._C._nn.linear, (side, basis)))
        return annotate(call("transpose", (annotate(call("unflatten", (made, -1, (-1, fmt.rank)))), 1, 2)))

    def _constant(self, name: str, value: Tensor) -> Node:
        """A node that reads a constant, which the module holds under ``name``."""
        name = f"factors_{name}"
        if name in self._constants:
            return self._constants[name]
        self.module.register_buffer(name, value, persistent=False)
        # Where the model's own weights are: whatever reads it may be moved as far up as its other inputs allow.
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            node = self._constants[name] = self.graph.get_attr(name)
        mode = fake_mode(self.graph)
        node.meta["example_value"] = value if mode is None else mode.from_tensor(value, static_shapes=True)
        return node


def latent(keys: Layout, values: Layout) -> bool:
    """Whether keys or values are stored as latents."""
    return keys.factors is not None or values.factors is not None
