"""Unified Layer Skipping: decode runs an evenly spread subset of layers, fixed by the target speed-up alone."""

from __future__ import annotations

from pydantic import Field

from ..base import Decline, Fidelity, Method, PassResult, Reason, RewriteContext
from ..layerwise import LayerwiseOptions


class UnifiedOptions(LayerwiseOptions):
    """target_speedup: layers divided by executed layers in decode, at least 1 (1 executes all of them).

    With ``layers`` only those of the skipped layers are skipped that it names.
    """

    target_speedup: float = Field(default=1.3, ge=1.0, le=64.0, allow_inf_nan=False)


def executed_layers(layers: int, target_speedup: float) -> list[int]:
    """Indices that run in decode: the first, the last, and every interval-th from the bottom until int(N / s) are kept.

    Raises ValueError when fewer than two layers would remain.
    """
    keep = int(layers / target_speedup)
    if keep < 2:
        raise ValueError(f"{layers} layers at a target speed-up of {target_speedup} leave {keep}; at least 2 must run")
    interval = int(layers / (keep - 1))
    reserved = {0, layers - 1}
    for index in range(1, layers - 1):
        if index % interval == 0 and len(reserved) < keep:
            reserved.add(index)
    return sorted(reserved)


class Unified(Method):
    """Skips layers in decode and extend; the prompt runs through all of them.

    A layer that never runs again needs no cache (policy "static"): its keys and values are not stored at all.
    """

    name = "unified"
    family = "layer_skipping"
    aliases = ("uls", "unified_layer_skipping")
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    paper = "Accelerating Inference in LLMs with a Unified Layer Skipping Strategy (2024)"
    Options = UnifiedOptions

    options: UnifiedOptions

    def apply(self, context: RewriteContext) -> PassResult:
        layers = context.anatomy.layers
        if not layers:
            return self.result([], [Decline("graph", Reason.NO_LAYERS)])
        try:
            executed = set(executed_layers(len(layers), self.options.target_speedup))
            executed |= set(range(len(layers))) - self.options.select(len(layers))
        except ValueError as error:
            return self.result([], [Decline("graph", Reason.TOO_FEW_LAYERS, str(error))])
        except IndexError as error:
            return self.result([], [Decline("graph", Reason.NO_SUCH_LAYER, str(error))])
        done: list[str] = []
        # From the top: the input of a skipped layer may be the output of another one.
        for layer in reversed(layers):
            site = layer.attention
            if layer.index in executed or site is None or not context.fuel.take():
                continue
            if context.anatomy.phase != "prefill":
                layer.output.replace_all_uses_with(layer.input)
            context.plan(site).dropped = True
            done.insert(0, layer.name)
        return self.result(done, [], f"decode runs layers {sorted(executed)} of {len(layers)}")
